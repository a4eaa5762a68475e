"""Smaller deltas: the errors reported are those found, int8 merges like any delta, and nothing is lost on failure."""

import json
from types import SimpleNamespace

import pytest
import torch
from lora_files import random_factors, write_kohya
from safetensors.torch import load_file, save_file

from perflow_diffusers.io import writer
from perflow_diffusers.weights import (
    DeltaError,
    MergeError,
    WeightSourceError,
    WeightWriteError,
    merge_delta,
    open_weights,
    unmerge_delta,
)
from perflow_diffusers.weights.make import shrink as pack
from perflow_diffusers.weights.make.shrink import shrink_delta
from perflow_diffusers.weights.read.lora import as_delta

STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture
def wide_file(unet, make_delta, tmp_path):
    path = tmp_path / "wide.safetensors"
    save_file(make_delta(unet, torch.float32), path, {"perflow_format": "delta-1", "recommended_steps": "[4]"})
    return path


@pytest.fixture
def int8_file(wide_file, tmp_path):
    return shrink_delta(wide_file, tmp_path / "int8.safetensors", "int8").path


def dequantised(path):
    """q * scale in float64, straight from the file."""
    raw = load_file(path)
    return {
        name: value.double() * raw[f"{name}.scale"].double().reshape(-1, *[1] * (value.dim() - 1))
        if f"{name}.scale" in raw
        else value.double()
        for name, value in raw.items()
        if not name.endswith(".scale")
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_report_and_content(wide_file, tmp_path, dtype):
    out = tmp_path / "small.safetensors"
    report = shrink_delta(wide_file, out, dtype)
    given = load_file(wide_file)
    found = dequantised(out)
    if dtype != "int8":
        assert all(torch.equal(found[name].to(STORED[dtype]), given[name].to(STORED[dtype])) for name in given)
    error = power = 0.0
    for name, value in given.items():
        difference, size = (found[name] - value.double()).norm().item(), value.double().norm().item()
        assert report.errors[name] == pytest.approx(difference / size, rel=1e-3, abs=1e-9)
        error, power = error + difference**2, power + size**2
    assert report.relative_error == pytest.approx((error / power) ** 0.5, rel=1e-3)
    assert 0 < report.relative_error < {"float16": 3e-4, "bfloat16": 3e-3, "int8": 8e-3}[dtype]
    assert report.nbytes_before == sum(value.nbytes for value in given.values())
    assert report.nbytes_after == sum(value.nbytes for value in load_file(out).values())
    assert json.loads(json.dumps(report.to_dict()))["relative_error"] == report.relative_error
    assert f"as {dtype}" in str(report) and report.path == out
    header = open_weights(out).metadata
    assert header["recommended_steps"] == "[4]" and header["format"] == "pt"
    assert header["perflow_format"] == ("delta-int8-1" if dtype == "int8" else "delta-1")
    assert header["dtype"] == {"float16": "F16", "bfloat16": "BF16", "int8": "F32,I8"}[dtype]
    assert open_weights(out).kind == "delta"


def test_int8_rounds_to_the_nearest_level_of_its_channel():
    torch.manual_seed(0)
    weight = torch.randn(5, 7, 3, 3) * torch.tensor([1.0, 1e-3, 0.0, 1e4, 1e-42]).reshape(5, 1, 1, 1)
    levels, scale = pack.quantise(weight)
    assert levels.dtype == torch.int8 and scale.shape == (5,) and scale.dtype == torch.float32
    assert levels.abs().amax(dim=(1, 2, 3))[[0, 1, 3]].tolist() == [127, 127, 127] and not levels[2].any()
    back = levels.double() * scale.double().reshape(5, 1, 1, 1)
    assert ((back - weight.double()).abs() <= 0.5001 * scale.double().reshape(5, 1, 1, 1) + 1e-40).all()


def test_int8_merges_with_one_rounding_and_comes_off(make_unet, bits, same, int8_file):
    unet = make_unet(torch.float16)
    before, wanted = bits(unet), dequantised(int8_file)
    handle = merge_delta(unet, int8_file, 0.75)
    wrong = sum(
        (weight != (before[name].double() + 0.75 * wanted[name]).half()).sum().item()
        for name, weight in bits(unet).items()
    )
    assert wrong < 0.001 * sum(weight.numel() for weight in before.values())
    assert handle.report.untouched == () and handle.plan.largest >= max(v.abs().max().item() for v in wanted.values())
    with pytest.warns(UserWarning, match="already"):
        merge_delta(unet, int8_file)
    unmerge_delta(unet)
    unmerge_delta(unet)
    assert same(bits(unet), before)


def test_int8_becomes_wider_again(int8_file, tmp_path):
    report = shrink_delta(int8_file, tmp_path / "half.safetensors", "float16")
    wanted = dequantised(int8_file)
    assert report.ratio > 1.5
    assert all(
        torch.allclose(value.double(), wanted[name], rtol=1e-3, atol=1e-7)
        for name, value in load_file(tmp_path / "half.safetensors").items()
    )


def test_vectors_stay_floating_point(delta_file, tmp_path):
    shrink_delta(delta_file, tmp_path / "int8.safetensors", "int8")
    given, found = load_file(delta_file), load_file(tmp_path / "int8.safetensors")
    vectors = [name for name, value in given.items() if value.dim() == 1]
    assert vectors and all(torch.equal(found[name], given[name]) for name in vectors)


def test_progress_and_one_tensor_at_a_time(delta, tmp_path):
    seen = []
    shrink_delta(delta, tmp_path / "x.safetensors", "int8", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, len(delta)) for number in range(1, len(delta) + 1)]


def test_what_cannot_be_shrunk(unet, delta, delta_file, tmp_path):
    out = tmp_path / "x.safetensors"
    with pytest.raises(DeltaError, match="dtype='int4' is unknown"):
        shrink_delta(delta_file, out, "int4")
    with pytest.raises(DeltaError, match="empty"):
        shrink_delta({}, out, "int8")
    with pytest.raises(DeltaError, match="is a LoRA, which is small already"):
        shrink_delta(write_kohya(tmp_path / "k.safetensors", random_factors(unet)), out, "float16")
    with pytest.raises(DeltaError, match="complete checkpoint"):
        shrink_delta({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2, 2)}, out, "int8")
    with pytest.raises(DeltaError, match=r"not floating point.*conv_in\.bias"):
        shrink_delta({**delta, "conv_in.bias": torch.ones(8, dtype=torch.int32)}, out, "int8")
    with pytest.raises(DeltaError, match="more than one tensor for a weight"):
        shrink_delta({**delta, "_orig_mod.conv_in.bias": torch.ones(8)}, out, "int8")
    for value, dtype in ((float("nan"), "int8"), (float("inf"), "bfloat16"), (1e6, "float16")):
        wide = {**delta, "conv_in.weight": torch.full((8, 4, 3, 3), value)}
        with pytest.raises(DeltaError, match=r"conv_in\.weight of .* has NaN or Inf"):
            shrink_delta(wide, out, dtype)
    assert not out.exists() and not list(tmp_path.glob(".perflow-*"))


def test_disk_full_interrupt_and_targets_leave_the_old_file(delta_file, tmp_path, monkeypatch):
    out = tmp_path / "small.safetensors"
    shrink_delta(delta_file, out, "int8")
    old = out.read_bytes()
    with pytest.raises(WeightWriteError, match="overwrite=True"):
        shrink_delta(delta_file, out, "float16")

    def stop(done, total):
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shrink_delta(delta_file, out, "float16", overwrite=True, progress=stop)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(WeightWriteError, match="10 left"):
        shrink_delta(delta_file, out, "float16", overwrite=True)
    assert out.read_bytes() == old and sorted(path.name for path in tmp_path.iterdir()) == [delta_file.name, out.name]


def test_a_delta_may_be_shrunk_in_place(delta_file):
    wanted = {name: value.bfloat16() for name, value in load_file(delta_file).items()}
    shrink_delta(delta_file, delta_file, "bfloat16", overwrite=True)
    found = load_file(delta_file)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_int8_files_that_are_damaged(unet, bits, same, int8_file, tmp_path):
    before, good = bits(unet), load_file(int8_file)
    name = "mid_block.resnets.0.conv1.weight"
    scale = good[f"{name}.scale"]

    def refused(changes, match, error):
        with pytest.raises(error, match=match):
            merge_delta(unet, {**good, **changes})
        assert same(bits(unet), before)

    refused({f"{name}.scale": scale[:-1]}, rf"scales do not fit.*{name}", WeightSourceError)
    refused({f"{name}.scale": scale.to(torch.int32)}, "scales do not fit", WeightSourceError)
    refused({f"{name}.scale": torch.full_like(scale, float("nan"))}, rf"NaN or Inf in 1 tensors: {name}", MergeError)
    refused({name: good[name][:, :3]}, "Misshapen", MergeError)
    lost = {key: value for key, value in good.items() if key != f"{name}.scale"}
    with pytest.raises(MergeError, match=rf"not floating point: {name} \(torch\.int8\)"):
        merge_delta(unet, lost)
    int8_file.write_bytes(int8_file.read_bytes()[:-1])
    with pytest.raises(WeightSourceError, match="truncated"):
        merge_delta(unet, int8_file)
    assert same(bits(unet), before)


def test_prefixes_of_int8_deltas(unet, int8_file, bits):
    merge_delta(unet, {f"unet.{name}": value for name, value in load_file(int8_file).items()})
    merged = bits(unet)
    unmerge_delta(unet)
    merge_delta(unet, int8_file)
    assert all(torch.equal(value, merged[name]) for name, value in bits(unet).items())
    assert as_delta(open_weights(int8_file)).shapes.keys() == merged.keys()
