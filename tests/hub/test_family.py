"""An accelerator says what its base is like, and a pipeline unlike it is refused, wherever the file is from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from hub_pipes import make_pipe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perflow_diffusers import PeRFlowScheduler, load_miniature
from perflow_diffusers.families.published import PUBLISHED
from perflow_diffusers.hub import ArtifactError, PeRFlowArtifact, load_perflow, set_scheduler
from perflow_diffusers.hub.base import base_facts
from perflow_diffusers.miniature import miniature_folder

SOURCES = ("miniature", "miniature-lora", "published")
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def source(request, tmp_path):
    """An embedded accelerator by name; or bare weights that only the table of published ones knows."""
    if request.param != "published":
        return request.param
    folder = Path(tmp_path, "perflow-sd15-delta-weights")
    folder.mkdir()
    weights = load_file(miniature_folder() / "delta" / "perflow.safetensors")
    save_file(weights, folder / "diffusion_pytorch_model.v0-1.safetensors")
    return folder


def with_scheduler(cls=DDIMScheduler, **other):
    pipe = load_miniature()
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **other)
    return pipe


@pytest.mark.parametrize("source", SOURCES, indirect=True)
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"beta_schedule": "linear"}, "beta_schedule is linear instead of scaled_linear"),  # AnimateDiff's recipe
        ({"beta_end": 0.02}, "beta_end is 0.02 instead of 0.012"),
        ({"prediction_type": "v_prediction"}, "its base predicts epsilon, this pipeline's v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True instead of False"),
        ({"trained_betas": [0.01] * 1000}, "trained_betas"),
    ],
    ids=["linear", "beta_end", "v_prediction", "zero_snr", "trained_betas"],
)
def test_another_schedule_or_prediction_is_refused_before_anything_changes(source, other, message, bits):
    pipe = with_scheduler(**other)
    before, former = bits.copy(pipe.unet), pipe.scheduler
    with pytest.raises(ArtifactError, match=message):
        load_perflow(pipe, source)
    assert bits.same(bits.copy(pipe.unet), before) and pipe.scheduler is former


@pytest.mark.parametrize("source", SOURCES, indirect=True)
def test_random_weights_are_refused_or_it_is_said_that_nobody_can_tell(source, records):
    pipe = load_miniature()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config)
    if isinstance(source, str):
        with pytest.raises(ArtifactError, match="nothing in common"):
            load_perflow(pipe, source)
        return
    load_perflow(pipe, source)
    said = [(level, text) for level, text in records if "do not say enough to check" in text]
    assert len(said) == 1 and said[0][0] == "INFO" and "that the weights are of its base" in said[0][1]


@pytest.mark.parametrize("source", SOURCES, indirect=True)
@pytest.mark.parametrize(
    "make",
    [
        lambda: load_miniature("disco"),
        lambda: with_scheduler(PNDMScheduler),  # has no rescale_betas_zero_snr, which says that nothing is rescaled
        lambda: with_scheduler(EulerDiscreteScheduler),
        lambda: with_scheduler(DPMSolverMultistepScheduler, use_karras_sigmas=True),
        lambda: with_scheduler(LCMScheduler),
        # the same schedule, said as numbers by diffusers
        lambda: with_scheduler(trained_betas=DDIMScheduler(**NOISE).betas.tolist(), beta_schedule="linear"),
    ],
    ids=["fine-tune", "pndm", "euler", "dpm", "lcm", "same trained_betas"],
)
def test_fine_tunes_and_other_samplers_of_the_same_base_are_no_cause_for_alarm(source, make, records):
    pipe = make()
    load_perflow(pipe, source)
    expected = DDIMScheduler(**NOISE).alphas_cumprod
    assert isinstance(pipe.scheduler, PeRFlowScheduler)
    assert torch.allclose(pipe.scheduler.alphas_cumprod, expected, rtol=1e-5, atol=0)
    assert not [text for level, text in records if level == "WARNING" and "sample with" not in text]


def test_not_strict_is_a_warning(records):
    load_perflow(with_scheduler(beta_schedule="linear"), "miniature", strict=False)
    assert (
        "WARNING",
        "miniature may not fit this pipeline: beta_schedule is linear instead of scaled_linear.",
    ) in records


def test_facts_that_nobody_gives_are_named_once(accelerators, records):
    load_perflow(make_pipe("sd"), accelerators["sd"].delta)  # written without any
    said = [record for record in records if "do not say enough" in record[1]]
    expected = "that the noise schedules agree, that the bases predict the same, that the weights are of its base."
    assert len(said) == 1 and said[0][0] == "WARNING" and said[0][1].endswith(expected)


def test_a_scheduler_that_is_set_for_other_noise_says_so(records):
    pipe = with_scheduler(beta_schedule="linear")
    set_scheduler(pipe, miniature_folder() / "delta" / "perflow.safetensors")
    assert any(level == "WARNING" and "beta_schedule is linear" in text for level, text in records)


@pytest.mark.parametrize("name", ["delta/perflow", "lora/pytorch_lora_weights", "lora/pytorch_lora_weights.residual"])
def test_the_embedded_files_say_what_their_base_says(name):
    with safe_open(miniature_folder() / f"{name}.safetensors", "pt") as file:
        header = file.metadata()
    base = load_miniature()
    assert json.loads(header["noise"]) == {key: base.scheduler.config[key] for key in json.loads(header["noise"])}
    assert set(json.loads(header["noise"])) >= {"beta_start", "beta_end", "beta_schedule", "num_train_timesteps"}
    assert header["base_prediction_type"] == base.scheduler.config.prediction_type
    assert json.loads(header["network"])["cross_attention_dim"] == base.unet.config.cross_attention_dim
    for weight, numbers in json.loads(header["base_sample"]).items():
        values = base.unet.get_parameter(weight).flatten()
        assert [numbers[0], numbers[-1]] == pytest.approx([values[0].item(), values[-1].item()], rel=1e-5)


def test_a_folder_says_what_its_pipeline_says(tmp_path):
    folder, pipe = miniature_folder() / "avatars", load_miniature()
    assert base_facts(folder) == base_facts(pipe)
    config = tmp_path / "scheduler" / "scheduler_config.json"
    base = make_pipe("sd", scheduler=PNDMScheduler(steps_offset=1, **NOISE))
    base.save_pretrained(tmp_path)
    content = json.loads(config.read_text())
    del content["prediction_type"], content["num_train_timesteps"]  # their defaults, which older files leave out
    config.write_text(json.dumps(content))
    assert base_facts(tmp_path) == base_facts(base)


def test_trained_betas_travel_with_the_artifact(accelerators, tmp_path):
    betas = torch.linspace(0.001, 0.01, 1000).tolist()
    base = make_pipe("sd", scheduler=DDIMScheduler(trained_betas=betas, steps_offset=1, clip_sample=False))
    PeRFlowArtifact.from_header(accelerators["sd"].delta).save(tmp_path / "a", base=base)
    load_perflow(base, tmp_path / "a")
    assert torch.allclose(base.scheduler.alphas_cumprod, DDIMScheduler(trained_betas=betas).alphas_cumprod)
    with pytest.raises(ArtifactError, match="trained_betas"):
        load_perflow(make_pipe("sd"), tmp_path / "a")


def test_what_training_said_of_the_schedule_wins_over_the_pipeline_it_started_from(accelerators, tmp_path):
    base = make_pipe("sd")
    noise = {**NOISE, "num_train_timesteps": 1000, "rescale_betas_zero_snr": True}
    artifact = replace(PeRFlowArtifact.from_header(accelerators["sd"].delta), prediction_type="velocity", noise=noise)
    saved = artifact.save(tmp_path / "a", base=base)
    assert saved.noise["rescale_betas_zero_snr"] is True
    config = json.loads((tmp_path / "a" / "scheduler" / "scheduler_config.json").read_text())
    assert PeRFlowScheduler.from_config(config).alphas_cumprod[-1] == 0
    with pytest.raises(ArtifactError, match="rescale_betas_zero_snr is False instead of True"):
        load_perflow(make_pipe("sd"), tmp_path / "a")


def test_the_table_knows_the_noise_of_every_family():
    for entry in PUBLISHED:
        said = PeRFlowArtifact.from_header(entry.metadata)
        assert {key: said.noise[key] for key in NOISE} == NOISE and said.noise["num_train_timesteps"] == 1000
        assert said.base_prediction_type == {"SD 2.x": "v_prediction"}.get(entry.family.name, "epsilon")


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        EDMEulerScheduler,
        CMStochasticIterativeScheduler,
    ],
)
@pytest.mark.parametrize("given", ["pipeline", "folder"])
def test_a_base_that_is_no_diffusion_by_betas_is_refused_before_anything_is_written(
    scheduler, given, accelerators, tmp_path
):
    base = make_pipe("sd", scheduler=scheduler())
    if given == "folder":
        base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="discrete betas"):
        PeRFlowArtifact.from_header(accelerators["sd"].delta).save(
            tmp_path / "a", base=tmp_path / "base" if given == "folder" else base
        )
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="discrete betas"):
        load_perflow(base, accelerators["sd"].delta)
