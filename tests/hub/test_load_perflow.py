"""One call applies everything, one call takes it back; anything wrong leaves the pipeline as it was."""

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    EulerDiscreteScheduler,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from hub_pipes import draw, make_pipe
from peft import LoraConfig

from perflow_diffusers import PeRFlowScheduler, load_miniature, merge_delta
from perflow_diffusers.hub import ArtifactError, PeRFlowArtifact, load_perflow, unload_perflow
from perflow_diffusers.weights import open_weights
from perflow_diffusers.weights.make.convert import convert_lora


def by_hand(kind, delta, scale=1.0):
    """The picture that the delta and the scheduler give when they are applied one by one."""
    pipe = make_pipe(kind)
    merge_delta(pipe, delta, scale)
    pipe.scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config, prediction_type="ddim_eps")
    return draw(pipe)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_delta_equals_the_steps_by_hand_and_unloads_to_the_last_bit(kind, accelerators, bits):
    pipe = make_pipe(kind)
    before, former, stock = bits.copy(pipe.unet), pipe.scheduler, draw(pipe)
    artifact = load_perflow(pipe, accelerators[kind].folder)
    assert (artifact.steps, artifact.guidance_scale, artifact.base_model) == (4, 2.0, f"someone/{kind}")
    assert np.array_equal(draw(pipe), by_hand(kind, accelerators[kind].delta))
    unload_perflow(pipe)
    assert bits.same(bits.copy(pipe.unet), before) and pipe.scheduler is former
    assert np.array_equal(draw(pipe), stock)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_lora_of_full_rank_equals_the_delta_and_unloads_to_the_last_bit(kind, accelerators, bits):
    pipe = make_pipe(kind)
    before, former = bits.copy(pipe.unet), pipe.scheduler
    load_perflow(pipe, accelerators[kind].folder, weights="lora")
    assert pipe.get_list_adapters() == {"unet": ["perflow"]}
    assert np.abs(draw(pipe) - by_hand(kind, accelerators[kind].delta)).max() < 2e-4
    unload_perflow(pipe)
    assert bits.same(bits.copy(pipe.unet), before) and pipe.scheduler is former


@pytest.mark.parametrize("weights", ["delta", "lora"])
def test_scale_is_the_strength_of_all_weights_biases_included(weights, accelerators):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder, weights, 0.5)
    assert np.abs(draw(pipe) - by_hand("sd", accelerators["sd"].delta, 0.5)).max() < 2e-4


def add_style(pipe, name, seed):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with warnings.catch_warnings():  # PEFT warns of a second adapter
        warnings.simplefilter("ignore")
        pipe.unet.add_adapter(config, adapter_name=name)


def test_other_loras_keep_their_weights_scales_and_whether_they_are_active(accelerators, bits):
    pipe = make_pipe("sd")
    add_style(pipe, "style", 1)
    add_style(pipe, "unused", 2)
    pipe.set_adapters(["style"], [0.7])
    before, stock = bits.copy(pipe.unet), draw(pipe)
    load_perflow(pipe, accelerators["sd"].folder, weights="lora")
    assert sorted(pipe.get_active_adapters()) == ["perflow", "style"]
    both = draw(pipe)
    unload_perflow(pipe)
    assert pipe.get_active_adapters() == ["style"] and set(pipe.get_list_adapters()["unet"]) == {"style", "unused"}
    assert bits.same(bits.copy(pipe.unet), before) and np.array_equal(draw(pipe), stock)
    merged = make_pipe("sd")
    merge_delta(merged, accelerators["sd"].delta)
    merged.scheduler = PeRFlowScheduler.from_config(merged.scheduler.config, prediction_type="ddim_eps")
    add_style(merged, "style", 1)
    merged.set_adapters(["style"], [0.7])
    assert np.abs(draw(merged) - both).max() < 2e-4


@pytest.mark.parametrize("state", ["fused", "off"])
def test_where_an_adapter_would_not_act_on_all_layers_the_lora_is_merged(state, accelerators, bits, records):
    """PEFT passes over an adapter in a layer that is fused with another one, or switched off."""
    pipe, plain = make_pipe("sd"), make_pipe("sd")
    for one in (pipe, plain):
        add_style(one, "style", 1)
        one.fuse_lora(adapter_names=["style"]) if state == "fused" else one.disable_lora()
    before, stock = bits.copy(pipe.unet), draw(pipe)
    load_perflow(pipe, accelerators["sd"].folder, weights="lora")
    assert "merged lora x 1 (not attached: " in [text for _, text in records if "sample with" in text][-1]
    merge_delta(plain, accelerators["sd"].delta)
    plain.scheduler = PeRFlowScheduler.from_config(plain.scheduler.config, prediction_type="ddim_eps")
    assert np.abs(draw(pipe) - draw(plain)).max() < 2e-4
    unload_perflow(pipe)
    assert bits.same(bits.copy(pipe.unet), before) and np.array_equal(draw(pipe), stock)


@pytest.mark.parametrize("what", ["pipeline", "peft"])
def test_a_pipeline_without_loras_and_a_place_without_peft_get_it_merged(what, accelerators, bits, monkeypatch):
    pipe = make_pipe("sd")
    before = bits.copy(pipe.unet)
    owner = pipe
    if what == "pipeline":  # as StableDiffusionAdapterPipeline, which has no loader of LoRAs
        owner = SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler)
    else:
        monkeypatch.setattr("perflow_diffusers.hub.adapters.is_peft_available", lambda: False)
    load_perflow(owner, accelerators["sd"].folder, weights="lora")
    assert not getattr(pipe.unet, "peft_config", {})
    pipe.scheduler = owner.scheduler
    assert np.abs(draw(pipe) - by_hand("sd", accelerators["sd"].lora)).max() < 1e-5
    unload_perflow(owner)
    assert bits.same(bits.copy(pipe.unet), before)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_kohya_file_acts_as_the_delta_it_was_made_of(kind, accelerators, bits, tmp_path):
    kohya = convert_lora(accelerators[kind].lora, tmp_path / "kohya.safetensors", "kohya")
    pipe = make_pipe(kind)
    before = bits.copy(pipe.unet)
    load_perflow(pipe, kohya)
    assert pipe.get_list_adapters() == {"unet": ["perflow"]}
    assert np.abs(draw(pipe) - by_hand(kind, accelerators[kind].delta)).max() < 2e-4
    unload_perflow(pipe)
    assert bits.same(bits.copy(pipe.unet), before)


def test_a_fused_perflow_is_not_unloaded_in_silence_and_a_deleted_one_leaves_no_wrappers(accelerators, bits):
    pipe = make_pipe("sd")
    before = bits.copy(pipe.unet)
    load_perflow(pipe, accelerators["sd"].folder, weights="lora")
    ours, attached = pipe.scheduler, bits.copy(pipe.unet)
    pipe.fuse_lora(adapter_names=["perflow"])
    fused = bits.copy(pipe.unet)
    with pytest.raises(ArtifactError, match=r"fused into the weights.*unfuse_lora"):
        unload_perflow(pipe)
    assert pipe.scheduler is ours and bits.same(bits.copy(pipe.unet), fused)
    pipe.unfuse_lora()
    pipe.unet.load_state_dict(attached)  # unfusing alone restores all but the last bits
    pipe.delete_adapters("perflow")
    unload_perflow(pipe)
    assert bits.same(bits.copy(pipe.unet), before)


def test_a_lora_that_is_loaded_later_survives_unloading(accelerators):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder, weights="lora")
    add_style(pipe, "style", 1)
    pipe.set_adapters(["perflow", "style"], [1.0, 0.4])
    unload_perflow(pipe)
    alone = make_pipe("sd")
    add_style(alone, "style", 1)
    alone.set_adapters(["style"], [0.4])
    assert np.array_equal(draw(pipe), draw(alone))


def test_the_scheduler_keeps_the_noise_of_the_pipeline_and_takes_type_and_windows_of_the_artifact(accelerators):
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe = make_pipe("sd", scheduler=EulerDiscreteScheduler(steps_offset=1, **noise))
    artifact = PeRFlowArtifact.from_folder(accelerators["sd"].folder)
    uneven = replace(artifact, num_time_windows=3, window_boundaries=(1000, 700, 200, 0), prediction_type="diff_eps")
    load_perflow(pipe, uneven, weights="delta")
    assert pipe.scheduler.windows.boundaries == (1000, 700, 200, 0)
    assert pipe.scheduler.config.perflow_type == "diff_eps" and pipe.scheduler.config.prediction_type == "epsilon"
    assert {key: pipe.scheduler.config[key] for key in noise} == noise


def test_the_choice_is_said_once_through_the_logger_of_diffusers(accelerators, records):
    load_perflow(make_pipe("sd"), accelerators["sd"].folder)
    load_perflow(make_pipe("sd", seed=0), accelerators["sd"].delta)
    chosen = [text for level, text in records if level == "WARNING" and "PeRFlowScheduler(" in text]
    assert len(chosen) == 2 and records[0][1] == chosen[0]
    for part in ("delta x 1", "ddim_eps", "[1000, 750, 500, 250, 0]", "num_inference_steps=4", "guidance_scale=2"):
        assert part in chosen[0] and part in chosen[1]


def test_a_fine_tune_is_the_normal_use_and_a_stranger_of_the_same_shape_is_not(artifact_folder, accelerators):
    load_perflow(load_miniature("disco"), artifact_folder)
    stranger = make_pipe("sd", seed=9)
    with pytest.raises(ArtifactError, match="nothing in common"):
        load_perflow(stranger, accelerators["sd"].folder)
    load_perflow(stranger, accelerators["sd"].folder, strict=False)
    half = make_pipe("sd").to(dtype=torch.float16)
    from perflow_diffusers.hub.network import relation

    sample = PeRFlowArtifact.from_folder(accelerators["sd"].folder).base_sample
    assert relation(sample, half) == "base" and relation(sample, make_pipe("sd", seed=9)) == "unrelated"
    assert relation(PeRFlowArtifact.from_folder(artifact_folder).base_sample, load_miniature("disco")) == "fine-tune"


def test_is_base_compares_every_bit(accelerators):
    artifact = PeRFlowArtifact.from_folder(accelerators["sd"].folder)
    pipe = make_pipe("sd")
    assert artifact.is_base(pipe)
    next(pipe.unet.parameters()).view(-1)[0] += 1e-3
    assert not artifact.is_base(pipe)


@pytest.mark.parametrize("weights", ["delta", "lora"])
def test_bare_files_know_their_family_by_their_shapes(weights, accelerators, bits):
    pipe = make_pipe("sdxl")
    before = bits.copy(pipe.unet)
    source = accelerators["sd"].folder / {"delta": "perflow", "lora": "pytorch_lora_weights"}[weights]
    artifact = replace(PeRFlowArtifact.from_header(source.with_suffix(".safetensors")), network={}, base_sample={})
    with pytest.raises(ValueError, match="does not fit"):
        load_perflow(pipe, artifact)
    assert bits.same(bits.copy(pipe.unet), before)


def test_bare_files_carry_everything(accelerators):
    folder = accelerators["sd"].folder
    whole = PeRFlowArtifact.from_folder(folder)
    for name in ("perflow.safetensors", "pytorch_lora_weights.safetensors"):
        bare = PeRFlowArtifact.from_header(folder / name)
        assert bare.settings == whole.settings
        pipe = make_pipe("sd")
        load_perflow(pipe, folder / name)
        assert np.abs(draw(pipe) - by_hand("sd", accelerators["sd"].delta)).max() < 2e-4


def test_inpainting_takes_delta_and_lora_on_its_noisy_inputs(accelerators, bits, records):
    base = make_pipe("sd")
    unet = UNet2DConditionModel(**{**base.unet.config, "in_channels": 9}).requires_grad_(False)
    weights = dict(base.unet.state_dict())
    wide = torch.zeros(8, 9, 3, 3)
    wide[:, :4] = weights.pop("conv_in.weight")
    unet.load_state_dict({**weights, "conv_in.weight": wide})
    pipe = base
    pipe.unet = unet
    before = bits.copy(unet)
    load_perflow(pipe, accelerators["sd"].folder)
    delta = open_weights(accelerators["sd"].delta)["conv_in.weight"]
    assert torch.equal(unet.conv_in.weight[:, :4], wide[:, :4] + delta) and not unet.conv_in.weight[:, 4:].any()
    merged = bits.copy(unet)
    unload_perflow(pipe)
    load_perflow(pipe, accelerators["sd"].folder, weights="lora")
    said = [text for _, text in records if "sample with" in text][-1]
    assert "merged lora x 1 (not attached: its first layer has 9 inputs, and the LoRA 4)" in said
    assert not unet.conv_in.weight[:, 4:].any() and not getattr(unet, "peft_config", {})
    assert all((weight - merged[name]).abs().max() < 2e-6 for name, weight in unet.state_dict().items())  # full rank
    unload_perflow(pipe)
    assert bits.same(bits.copy(unet), before)


@pytest.mark.parametrize("weights", ["delta", "lora"])
def test_motion_models_take_both_and_give_both_back(weights, accelerators, bits):
    base = make_pipe("sd")
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_norm_num_groups=4,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    unet = UNetMotionModel.from_unet2d(base.unet, adapter)
    pipe = AnimateDiffPipeline(base.vae, None, None, unet, None, base.scheduler)
    before = bits.copy(unet)
    load_perflow(pipe, accelerators["sd"].folder, weights)
    assert isinstance(pipe.scheduler, PeRFlowScheduler) and not bits.same(bits.copy(unet), before)
    unload_perflow(pipe)
    assert bits.same(bits.copy(unet), before) and pipe.scheduler is base.scheduler


def test_a_local_path_wins_over_a_short_name_and_the_log_says_so(accelerators, tmp_path, monkeypatch, records):
    monkeypatch.chdir(tmp_path)
    Path("miniature").symlink_to(accelerators["sd"].folder)
    assert load_perflow(make_pipe("sd"), "miniature").base_model == "someone/sd"
    assert records[0] == ("INFO", "'miniature' is a local path, which wins over the known name.")
    Path("miniature").unlink()
    assert load_perflow(load_miniature(), "miniature").prediction_type == "ddim_eps"
