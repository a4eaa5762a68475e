"""What an artefact of a flow-matching base says: windows as noise levels, their shift, and which process it is for."""

import json

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from flow_accelerator import BOUNDARIES, SETTINGS

from perflow_diffusers import FlowMatchPeRFlowScheduler, PeRFlowScheduler
from perflow_diffusers.hub import ArtifactError, PeRFlowArtifact
from perflow_diffusers.hub.said import checked, from_scheduler

CONFIG = FlowMatchEulerDiscreteScheduler(shift=3.0).config


def test_settings_header_and_scheduler_say_the_same_windows():
    made = PeRFlowArtifact(prediction_type="velocity", window_shift=2.0)
    assert made.settings == {
        "prediction_type": "velocity",
        "process": "flow",
        "num_time_windows": 4,
        "window_boundaries": pytest.approx(BOUNDARIES, abs=1e-15),
        "window_shift": 2.0,
    }
    assert json.loads(made.metadata["window_boundaries"]) == list(made.window_boundaries)
    assert made.metadata["window_shift"] == "2.0" and made.metadata["process"] == "flow"
    again = PeRFlowArtifact.from_header(dict(made.metadata))
    assert again.settings == made.settings
    scheduler = made.make_scheduler(CONFIG)
    assert type(scheduler) is FlowMatchPeRFlowScheduler
    said = from_scheduler(json.loads(scheduler.to_json_string()), "there")
    assert (said.process, said.prediction_type) == ("flow", "velocity")
    assert (said.window_boundaries, said.window_shift) == (made.window_boundaries, 2.0)
    assert said.noise["shift"] == 3.0


@pytest.mark.parametrize(
    "given",
    [
        {"window_boundaries": BOUNDARIES, "window_shift": 2.0},
        {"window_shift": 2.0, "num_time_windows": 4},
        {"window_shift": 2.0, "process": "flow"},
        {"window_boundaries": [1, 0.5, 0], "window_shift": 1},
        {"window_boundaries": [1, 0], "process": "flow", "window_shift": 1},
    ],
)
def test_any_sign_of_a_flow_is_enough(given):
    header = {"prediction_type": "velocity", **{k: v if k == "process" else json.dumps(v) for k, v in given.items()}}
    artifact = PeRFlowArtifact.from_header(header)
    assert artifact.is_flow and all(isinstance(one, float) for one in artifact.window_boundaries)
    scheduler = artifact.make_scheduler(CONFIG)
    expected = given.get("window_boundaries", BOUNDARIES)
    assert scheduler.windows.boundaries == pytest.approx(tuple(expected), abs=1e-15)
    assert scheduler.windows.shift == given["window_shift"]


def test_the_pipelines_own_shift_moves_no_window():
    artifact = PeRFlowArtifact.from_header(
        {k: json.dumps(v) if k != "prediction_type" else v for k, v in SETTINGS.items()}
    )
    for config in (CONFIG, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config):
        scheduler = artifact.make_scheduler(config)
        scheduler.set_timesteps(8)
        # 2 u / (1 + u) at u = 1, 7/8, ..., 1/8
        assert scheduler.sigmas[:-1].tolist() == pytest.approx([2 * i / (8 + i) for i in range(8, 0, -1)], abs=1e-7)
        back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        assert {key: back.config[key] for key in config if key[0] != "_"} == {
            k: v for k, v in config.items() if k[0] != "_"
        }


def test_artefacts_of_diffusions_say_what_they_said():
    made = PeRFlowArtifact(prediction_type="ddim_eps", window_boundaries=(1000, 750, 500, 250, 0))
    assert not made.is_flow
    assert json.dumps(made.settings) == (
        '{"prediction_type": "ddim_eps", "num_time_windows": 4, "window_boundaries": [1000, 750, 500, 250, 0]}'
    )
    assert type(made.make_scheduler({"num_train_timesteps": 1000})) is PeRFlowScheduler


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prediction_type": "ddim_eps"}, "prediction_type='ddim_eps'; expected velocity"),
        ({"window_boundaries": [1000, 750, 500, 250, 0]}, "window_boundaries=.*expected falling noise levels from 1"),
        ({"window_boundaries": [1.0, 0.5, 0.5, 0.0]}, "strictly falling"),
        ({"window_boundaries": [1.5, 0.5, 0.0]}, "window_boundaries=.*expected a list"),
        ({"window_shift": None}, r"window_shift=None.*expected the shift.*1\.0 for even"),
        ({"window_shift": 0.0}, "window_shift=0.0; expected a number"),
        ({"num_time_windows": 3}, "num_time_windows=3; expected 4"),
        ({"t_clean": 0.1}, "t_clean=0.1; expected nothing"),
        ({"process": "edm"}, "process='edm'; expected 'flow'"),
        ({"noise": {"shift": -1}}, "shift=-1; expected a number"),
    ],
)
def test_what_contradicts_itself_is_refused(changed, message):
    content = {"format_version": 1, **SETTINGS, **changed}
    with pytest.raises(ArtifactError, match=message):
        said = checked({key: value for key, value in content.items() if value is not None}, "perflow.json")
        PeRFlowArtifact(**{k: v for k, v in vars(said).items() if v is not None and k != "recommended_guidance_scale"})
