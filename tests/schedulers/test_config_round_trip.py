"""Coming from stock schedulers, going back to them, saving and loading."""

import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# What `pipe.scheduler` is after loading SD1.5, SD2.1, SDXL, and schedulers made in memory with defaults of their own.
ORIGINALS = {
    "sd15": lambda: PNDMScheduler.from_config(
        {
            **SD,
            "_class_name": "PNDMScheduler",
            "_diffusers_version": "0.6.0",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
            "clip_sample": False,
        }
    ),
    "sd21": lambda: DDIMScheduler.from_config(
        {
            **SD,
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "clip_sample": False,
        }
    ),
    "sdxl": lambda: EulerDiscreteScheduler.from_config(
        {
            **SD,
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "epsilon",
            "interpolation_type": "linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "use_karras_sigmas": False,
            "sample_max_value": 1.0,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "clip_sample": False,
            "trained_betas": None,
        }
    ),
    "defaults": lambda: DDIMScheduler(),
    "sample": lambda: DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="sample", num_train_timesteps=500
    ),
    "trained betas": lambda: EulerDiscreteScheduler(
        trained_betas=[0.01 + 1e-4 * i for i in range(100)], num_train_timesteps=100
    ),
}
TARGETS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
    PNDMScheduler,
]


def facts(scheduler):
    """Everything a scheduler was constructed with."""
    names = [n for n in inspect.signature(type(scheduler).__init__).parameters if n != "self"]
    return {name: scheduler.config.get(name) for name in names}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("original", ORIGINALS.values(), ids=ORIGINALS)
def test_going_back_is_as_if_we_had_never_been_there(original, target, tmp_path):
    stock = original()
    for name in ("ddim_eps", "diff_eps", "velocity"):
        perflow = PeRFlowScheduler.from_config(stock.config, prediction_type=name)
        expected = target.from_config(stock.config)
        for source in (perflow, PeRFlowScheduler.from_config(perflow.config)):
            back = target.from_config(source.config)
            assert facts(back) == facts(expected)
            assert torch.equal(back.alphas_cumprod, expected.alphas_cumprod)
            back.set_timesteps(7)
            expected.set_timesteps(7)
            assert torch.equal(back.timesteps, expected.timesteps)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_going_back_after_save_and_load(name, target, tmp_path):
    stock = ORIGINALS[name]()
    PeRFlowScheduler.from_config(stock.config, prediction_type="ddim_eps").save_pretrained(tmp_path)
    back = target.from_config(PeRFlowScheduler.from_pretrained(tmp_path).config)
    assert facts(back) == facts(target.from_config(stock.config))


def test_a_default_that_schedulers_disagree_on_stays_open_in_the_file(tmp_path):
    stock = {**SD, "_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
    PeRFlowScheduler.from_config(stock, prediction_type="ddim_eps").save_pretrained(tmp_path)
    loaded = PeRFlowScheduler.from_pretrained(tmp_path)
    assert loaded.config.set_alpha_to_one is False
    assert DDIMScheduler.from_config(loaded.config).config.set_alpha_to_one is True
    PeRFlowScheduler(prediction_type="ddim_eps", set_alpha_to_one=True).save_pretrained(tmp_path)
    assert PeRFlowScheduler.from_pretrained(tmp_path).config.set_alpha_to_one is True


@pytest.mark.parametrize("original", ORIGINALS.values(), ids=ORIGINALS)
def test_the_noise_schedule_is_the_bases(original):
    stock = original()
    perflow = PeRFlowScheduler.from_config(stock.config, prediction_type="velocity")
    assert torch.equal(perflow.alphas_cumprod, stock.alphas_cumprod)
    assert perflow.config.prediction_type == stock.config.prediction_type
    assert perflow.config.perflow_type == "velocity"


@pytest.mark.parametrize("original", ORIGINALS.values(), ids=ORIGINALS)
def test_a_stock_config_alone_is_refused(original):
    with pytest.raises(
        ValueError, match=r"(what the base model predicts|was not given).*card, or `perflow info FILE`"
    ):
        PeRFlowScheduler.from_config(original().config)


def test_the_type_is_remembered_across_a_visit_to_another_scheduler():
    perflow = PeRFlowScheduler.from_config(ORIGINALS["sd21"]().config, prediction_type="diff_eps", num_time_windows=8)
    back = PeRFlowScheduler.from_config(DDIMScheduler.from_config(perflow.config).config)
    assert facts(back) == facts(perflow)


def test_a_published_config_is_understood():
    published = {
        **SD,
        "_class_name": "PeRFlowScheduler",
        "_diffusers_version": "0.25.1",
        "num_time_windows": 4,
        "prediction_type": "ddim_eps",
        "set_alpha_to_one": False,
        "t_clean": 0,
        "t_noise": 1,
        "trained_betas": None,
    }
    scheduler = PeRFlowScheduler.from_config(published)
    assert (scheduler.config.perflow_type, scheduler.config.prediction_type) == ("ddim_eps", "epsilon")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [1000, 875, 750, 500, 250]
    changed = PeRFlowScheduler.from_config(published, prediction_type="diff_eps")
    assert changed.config.perflow_type == "diff_eps"
    # Whether the base of a velocity student predicts epsilon or v nobody has said: other schedulers must not guess.
    velocity = PeRFlowScheduler.from_config(published, prediction_type="velocity")
    ddim = DDIMScheduler.from_config(velocity.config)
    ddim.set_timesteps(4)
    with pytest.raises(ValueError, match="prediction_type given as None"):
        ddim.step(torch.zeros(1, 4, 2, 2), 1, torch.zeros(1, 4, 2, 2))
    old = {**published, "prediction_type": "epsilon"}
    with pytest.raises(ValueError, match="older than April 2024 say epsilon and mean diff_eps"):
        PeRFlowScheduler.from_config(old)


def test_both_keys_may_be_given():
    scheduler = PeRFlowScheduler(prediction_type="v_prediction", perflow_type="velocity")
    assert (scheduler.config.prediction_type, scheduler.config.perflow_type) == ("v_prediction", "velocity")
    assert DDIMScheduler.from_config(scheduler.config).config.prediction_type == "v_prediction"
    changed = PeRFlowScheduler.from_config(scheduler.config, prediction_type="ddim_eps")
    assert (changed.config.prediction_type, changed.config.perflow_type) == ("v_prediction", "ddim_eps")


def test_two_types_that_differ_are_refused():
    stock = ORIGINALS["sd21"]().config
    with pytest.raises(ValueError, match="contradict"):
        PeRFlowScheduler.from_config(stock, prediction_type="ddim_eps", perflow_type="velocity")
    same = PeRFlowScheduler.from_config(stock, prediction_type="ddim_eps", perflow_type="ddim_eps")
    assert (same.config.prediction_type, same.config.perflow_type) == ("v_prediction", "ddim_eps")


def test_a_scheduler_made_directly_hands_its_noise_schedule_on():
    back = DDIMScheduler.from_config(PeRFlowScheduler(prediction_type="ddim_eps").config)
    assert (back.config.beta_schedule, back.config.beta_start) == ("scaled_linear", 0.00085)


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "ddim_eps"},
        {"prediction_type": "velocity", "rescale_betas_zero_snr": True, "set_alpha_to_one": True},
        {"prediction_type": "diff_eps", "window_boundaries": [1000, 800, 300, 0]},
        {"prediction_type": "ddim_eps", "num_time_windows": 6, "t_noise": 0.96, "t_clean": 0.01},
        {"prediction_type": "ddim_eps", "trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
    ],
)
def test_save_and_load(options, tmp_path):
    scheduler = PeRFlowScheduler(**options)
    scheduler.save_pretrained(tmp_path)
    loaded = PeRFlowScheduler.from_pretrained(tmp_path)
    assert facts(loaded) == facts(scheduler)
    assert loaded.windows == scheduler.windows
    assert torch.equal(loaded.path.alpha, scheduler.path.alpha)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "PeRFlowScheduler"


def test_window_count_follows_the_boundaries():
    scheduler = PeRFlowScheduler(prediction_type="ddim_eps", window_boundaries=[1000, 400, 0])
    assert scheduler.config.num_time_windows == 2
    copy = PeRFlowScheduler.from_config(scheduler.config)
    assert copy.windows == scheduler.windows
    uniform = PeRFlowScheduler.from_config(scheduler.config, window_boundaries=None)
    assert uniform.windows.boundaries == (1000, 500, 0)


def test_boundaries_of_any_sequence_are_saved_as_integers(tmp_path):
    for i, boundaries in enumerate([(1000.0, 400.0, 0.0), np.array([1000, 400, 0]), torch.tensor([1000, 400, 0])]):
        PeRFlowScheduler(prediction_type="ddim_eps", window_boundaries=boundaries).save_pretrained(tmp_path / str(i))
        saved = json.loads((tmp_path / str(i) / "scheduler_config.json").read_text())
        assert saved["window_boundaries"] == [1000, 400, 0]


def test_unused_arguments_are_returned_when_asked_for():
    scheduler, unused = PeRFlowScheduler.from_config(
        ORIGINALS["sd15"]().config, prediction_type="ddim_eps", return_unused_kwargs=True, colour="red"
    )
    assert scheduler.config.perflow_type == "ddim_eps"
    assert unused["colour"] == "red"
