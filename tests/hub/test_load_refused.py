"""What `load_perflow` refuses, and that a failure at any moment leaves the pipeline as it was."""

import warnings
from unittest.mock import Mock

import pytest
import torch
from diffusers import (
    DDIMScheduler,
)
from hub_pipes import make_pipe, make_unet
from peft import LoraConfig

from perflow_diffusers.hub import ArtifactError, PeRFlowArtifact, load_perflow, set_scheduler, unload_perflow
from perflow_diffusers.hub.adapters import detach
from perflow_diffusers.weights import MergeError


def add_style(pipe, name, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with warnings.catch_warnings():  # PEFT warns of a second adapter
        warnings.simplefilter("ignore")
        pipe.unet.add_adapter(config, adapter_name=name)


STOCK = {"steps_offset": 1, "clip_sample": False}


V_PREDICTION = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", **STOCK
)


OTHER_NOISE = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", **STOCK)


@pytest.mark.parametrize("weights", ["delta", "lora"])
@pytest.mark.parametrize(
    ("pipe", "message"),
    [
        (lambda: make_pipe("sdxl"), "differs from this pipeline's: cross_attention_dim 16 for 24"),
        (lambda: make_pipe("sd", scheduler=V_PREDICTION), "base predicts epsilon, this pipeline's v_prediction"),
        (lambda: make_pipe("sd", scheduler=OTHER_NOISE), "beta_schedule is linear instead of scaled_linear"),
    ],
    ids=["family", "prediction", "noise"],
)
def test_another_family_is_an_error_and_changes_nothing(weights, pipe, message, accelerators, bits):
    pipe = pipe()
    before, former = bits.copy(pipe.unet), pipe.scheduler
    with pytest.raises(ArtifactError, match=message):
        load_perflow(pipe, accelerators["sd"].folder, weights)
    assert bits.same(bits.copy(pipe.unet), before) and pipe.scheduler is former


@pytest.mark.parametrize("style", [True, False], ids=["style", "alone"])
@pytest.mark.parametrize(
    ("weights", "where"), [("delta", "scheduler"), ("lora", "scheduler"), ("lora", "injecting"), ("lora", "scaling")]
)
def test_a_failure_at_any_moment_leaves_the_pipeline_as_it_was(weights, where, style, accelerators, bits, monkeypatch):
    pipe = make_pipe("sd")
    if style:
        add_style(pipe, "style", 1)
    before, former = bits.copy(pipe.unet), pipe.scheduler

    def fail(*args, **kwargs):
        raise RuntimeError("at the last moment")

    if where == "scheduler":
        monkeypatch.setattr(type(pipe), "__setattr__", fail)
    elif where == "injecting":
        monkeypatch.setattr("peft.set_peft_model_state_dict", fail)
    else:
        monkeypatch.setattr("perflow_diffusers.hub.adapters._names", Mock(side_effect=RuntimeError("too late")))
        monkeypatch.setattr("perflow_diffusers.hub.adapters.detach", lambda pipe: (monkeypatch.undo(), detach(pipe)))
    with pytest.raises(RuntimeError):
        load_perflow(pipe, accelerators["sd"].folder, weights)
    monkeypatch.undo()
    assert bits.same(bits.copy(pipe.unet), before) and pipe.scheduler is former
    assert getattr(pipe.unet, "peft_config", {}).keys() == ({"style"} if style else set())
    load_perflow(pipe, accelerators["sd"].folder, weights)


def test_twice_and_never_are_clear_errors(accelerators):
    pipe = make_pipe("sd")
    with pytest.raises(ArtifactError, match="Nothing is loaded"):
        unload_perflow(pipe)
    load_perflow(pipe, accelerators["sd"].folder)
    with pytest.raises(ArtifactError, match=r"is loaded into this pipeline. Call `unload_perflow"):
        load_perflow(pipe, accelerators["sd"].folder)
    with pytest.raises(ArtifactError, match="is loaded, with its scheduler"):
        set_scheduler(pipe, accelerators["sd"].folder)
    unload_perflow(pipe)
    load_perflow(pipe, accelerators["sd"].folder, weights="lora")
    with pytest.raises(ArtifactError, match="weights='both' is unknown"):
        load_perflow(make_pipe("sd"), accelerators["sd"].folder, weights="both")
    for wrong in ("all", "none"):  # which other functions know
        with pytest.raises(ArtifactError, match=f"weights='{wrong}' is unknown"):
            load_perflow(make_pipe("sd"), accelerators["sd"].folder, weights=wrong)
    for scale in ("x", float("nan"), None):
        for weights in ("delta", "lora"):
            with pytest.raises(ArtifactError, match="not a finite number"):
                load_perflow(make_pipe("sd"), accelerators["sd"].folder, weights, scale)
    settings = PeRFlowArtifact.from_header({"prediction_type": "ddim_eps"})
    with pytest.raises(ArtifactError, match=r"settings only.*with_files"):
        load_perflow(make_pipe("sd"), settings)
    with pytest.raises(ArtifactError, match="is empty"):
        load_perflow(make_pipe("sd"), "")
    with pytest.raises(ArtifactError, match="is a delta, and weights='lora'"):
        load_perflow(make_pipe("sd"), accelerators["sd"].delta, weights="lora")


def test_weights_that_others_changed_are_not_overwritten_unless_forced(accelerators, bits):
    pipe = make_pipe("sd")
    before = bits.copy(pipe.unet)
    load_perflow(pipe, accelerators["sd"].folder)
    ours = pipe.scheduler
    pipe.unet.conv_in.weight.mul_(2)
    with pytest.raises(MergeError, match="have changed since the merge"):
        unload_perflow(pipe)
    assert pipe.scheduler is ours
    unload_perflow(pipe, force=True)
    assert bits.same(bits.copy(pipe.unet), before)


def test_without_a_backup_nothing_pretends_to_unload(accelerators):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder, backup="none")
    ours = pipe.scheduler
    with pytest.raises(MergeError, match="backup='none', so nothing can undo"):
        unload_perflow(pipe)
    assert pipe.scheduler is ours


def test_pipelines_without_what_it_needs_are_refused(accelerators):
    with pytest.raises(MergeError, match="has no UNet"):
        load_perflow(type("Pipe", (), {})(), accelerators["sd"].folder)
    bare = type("Pipe", (), {})()
    bare.unet = make_unet("sd")
    with pytest.raises(ArtifactError, match="has no scheduler"):
        load_perflow(bare, accelerators["sd"].folder)


def test_a_delta_that_does_not_say_how_it_was_trained_is_refused(tmp_path):
    from safetensors.torch import save_file

    unet = make_unet("sd")
    save_file(
        {name: torch.zeros_like(weight) for name, weight in unet.state_dict().items()}, tmp_path / "d.safetensors"
    )
    with pytest.raises(ArtifactError, match=r"does not say how it was trained.*card"):
        load_perflow(make_pipe("sd"), tmp_path / "d.safetensors")
