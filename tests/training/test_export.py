"""From a checkpoint to what people load."""

import json

import pytest
import torch
from safetensors.torch import load_file

import export_perflow
from perflow_diffusers import load_miniature, merge_delta
from perflow_diffusers.weights import open_weights

WARM = ("ema_decay=0.0", "lr_warmup_steps=0", "max_train_steps=2", "checkpointing_steps=2", "learning_rate=1e-2")


def unet(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_a_checkpoint_gives_what_the_run_gave(run, capsys):
    out = run(*WARM, "solve_guidance=7.5")
    export_perflow.main([str(out), "--rank", "4"])
    exported = out / "checkpoint-2" / "export"
    assert "artifact: " in capsys.readouterr().out
    student, again = unet(out / "unet"), unet(exported / "unet")
    assert all(torch.equal(student[name], again[name]) for name in student)
    first, second = (open_weights(folder / "perflow.safetensors") for folder in (out, exported))
    assert dict(first.metadata) == dict(second.metadata)
    assert all(torch.equal(first[name], second[name]) for name in first)
    lora = open_weights(exported / "lora" / "pytorch_lora_weights.safetensors")
    assert lora.kind == "lora"
    assert lora.metadata["prediction_type"] == "ddim_eps"
    assert max(lora.shapes[name][0] for name in lora if "lora_A" in name) == 4


def test_a_trained_lora_is_the_student_in_diffusers_and_in_a_merge(run):
    """Loaded by diffusers, merged as a delta, or the fused student itself: one picture."""
    out = run(*WARM, "lora_rank=3", "lora_alpha=6", "product=[student, delta, lora]")
    path = out / "lora" / "pytorch_lora_weights.safetensors"
    metadata = open_weights(path).metadata
    assert (metadata["perflow_format"], metadata["num_time_windows"]) == ("lora-1", "4")
    assert json.loads(metadata["lora_adapter_metadata"])["unet.r"] == 3
    student = unet(out / "unet")
    pipe = load_miniature()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    moved = max(float((student[name] - before[name]).abs().max()) for name in student)
    assert moved > 1e-3
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = load_miniature()
    merge_delta(merged, out / "perflow.safetensors")
    for name, value in student.items():
        assert (pipe.unet.state_dict()[name] - value).abs().max() < 2e-3 * moved + 1e-6, name
        assert (merged.unet.state_dict()[name] - value).abs().max() < 2e-3 * moved + 1e-6, name


def test_the_artefact_loads_in_one_line(run):
    hub = pytest.importorskip("perflow_diffusers.hub.load")
    out = run(*WARM)
    export_perflow.main([str(out / "checkpoint-2"), "--out", str(out / "product"), "--form", "artifact"])
    assert not (out / "product" / "unet").exists()
    pipe = load_miniature()
    artifact = hub.load_perflow(pipe, out / "product" / "artifact")
    assert artifact.prediction_type == "ddim_eps"
    assert type(pipe.scheduler).__name__ == "PeRFlowScheduler"
    student = unet(out / "unet")
    got = pipe.unet.state_dict()
    assert all((got[name] - value).abs().max() < 1e-3 for name, value in student.items())


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export_perflow.main([str(tmp_path)])
    assert "is no checkpoint and holds none" in capsys.readouterr().err
