"""Whole runs of every kind of teacher, on networks of a few thousand weights."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from run_log import logged
from safetensors.torch import load_file

import precompute
from perflow_diffusers.weights import open_weights


@pytest.fixture
def other_teacher(tmp_path):
    """The miniature's pipeline with another scheduler, as a folder."""

    def make(**scheduler):
        from perflow_diffusers import load_miniature

        pipe = load_miniature()
        kind = scheduler.pop("kind", DDIMScheduler)
        pipe.scheduler = kind(**scheduler)
        pipe.save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    return make


@pytest.fixture
def pictures(tmp_path):
    """Three tall and three wide pictures with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(6):
        size = (20, 40, 3) if i % 2 else (40, 20, 3)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_sdxl_from_pictures_in_aspect_buckets(run, tiny_sdxl, pictures):
    out = run(
        f"pretrained_model_name_or_path={tiny_sdxl}", "train_captions=", f"train_data_dir={pictures}", "resolution=16",
        "aspect_buckets=true", "bucket_step=8", "data_starts=0.5", "max_train_steps=6", "reuse=1", "buffer_size=64",
        "solve_guidance=2.0", "gradient_checkpointing=true", "learning_rate=1e-3", "lr_warmup_steps=0",
        "ema_decay=0.5",
    )  # fmt: skip
    assert all(sum(filter(None, line["loss"])) > 0 for line in logged(out))
    before = UNet2DConditionModel.from_pretrained(tiny_sdxl, subfolder="unet").state_dict()
    after = load_file(out / "unet" / "diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("images", [True, False])
def test_sdxl_from_a_cache_needs_no_encoders(run, words, tiny_sdxl, pictures, tmp_path, monkeypatch, images):
    options = [
        f"pretrained_model_name_or_path={tiny_sdxl}", "train_captions=", f"train_data_dir={pictures}", "resolution=16",
        f"train_cache_dir={tmp_path / 'cache'}", "max_train_steps=2", f"data_starts={float(images)}",
    ]  # fmt: skip
    precompute.main([*([] if images else ["--prompts-only"]), *words(*options)])
    loaded = []
    original = torch.nn.Module.eval
    monkeypatch.setattr(torch.nn.Module, "eval", lambda self: loaded.append(type(self).__name__) or original(self))
    out = run(*options, "lora_rank=2")
    assert not {name for name in loaded if "CLIP" in name or "Autoencoder" in name}
    assert open_weights(out / "lora" / "pytorch_lora_weights.safetensors").kind == "lora"


def test_v_prediction_at_zero_terminal_snr(run, other_teacher):
    folder = other_teacher(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False,
    )  # fmt: skip
    out = run(f"pretrained_model_name_or_path={folder}", "prediction_type=velocity", "max_train_steps=2")
    assert all(np.isfinite(list(filter(None, line["loss"]))).all() for line in logged(out))


@pytest.mark.parametrize("solver", ["deis", "heun"])
def test_every_solver_and_bf16_with_a_lora(run, solver):
    out = run(f"solver={solver}", "max_train_steps=2", "mixed_precision=bf16", "lora_rank=2",
              "reweighting_scheme=rcp_win", "loss=pseudo_huber", "discrete_timesteps=40")  # fmt: skip
    lora = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    assert all(value.isfinite().all() for value in lora.values())


def test_validation_and_a_cache_exclude_each_other(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(f"train_cache_dir={tmp_path / 'cache'}", "train_captions=", "validation_steps=1", "validation_prompts=[a]")
    assert "`validation_steps` needs the VAE" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed_is_named(run, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("report_to=wandb", "max_train_steps=1")
    assert "`report_to=wandb` needs the package wandb" in capsys.readouterr().err


def test_a_nan_ends_the_run_with_a_diagnosis(run):
    with pytest.raises(SystemExit, match="not finite at step"):
        run("max_train_steps=4", "learning_rate=1e30", "lr_warmup_steps=0", "lr_scheduler=constant")
