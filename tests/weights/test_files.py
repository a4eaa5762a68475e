"""Merging from file to file: what cannot be merged is refused, and what is written is what diffusers then loads."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import (
    DeltaError,
    MergeError,
    WeightWriteError,
    compute_delta,
    merge_delta,
    merge_files,
    open_weights,
)


@pytest.fixture
def base(unet, tmp_path):
    save_file(unet.state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "much"])
def test_scale_must_be_a_finite_number(base, delta, tmp_path, scale):
    with pytest.raises(MergeError, match="not a finite number"):
        merge_files(base, delta, tmp_path / "out.safetensors", scale=scale)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("dtype", "message"), [(torch.float8_e4m3fn, "fp8"), (torch.int8, "quantised")])
def test_a_base_that_cannot_take_a_delta_is_refused(unet, delta, tmp_path, dtype, message):
    packed = {name: weight.to(dtype) for name, weight in unet.state_dict().items()}
    with pytest.raises(MergeError, match=message):
        merge_files(packed, delta, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_delta_is_no_base(base, delta_file, tmp_path):
    with pytest.raises(DeltaError, match="is a delta, not complete weights"):
        merge_files(delta_file, delta_file, tmp_path / "out.safetensors")
    with pytest.raises(DeltaError, match="is a delta, not complete weights"):
        compute_delta(base, delta_file)


def test_a_merge_replaces_a_sharded_model_whole(make_unet, unet, delta, bits, same, tmp_path):
    """diffusers prefers an index of shards: one left behind would go on giving the old weights."""
    folder = tmp_path / "model"
    unet.save_pretrained(folder, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightWriteError, match="overwrite=True"):
        merge_files(folder, delta, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    merge_files(folder, delta, folder, overwrite=True)
    merge_delta(unet, delta)
    assert same(bits(UNet2DConditionModel.from_pretrained(folder)), bits(unet))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_of_a_file_and_an_index_the_index_counts_as_in_diffusers(unet, make_unet, bits, same, tmp_path):
    make_unet(seed=5).save_pretrained(tmp_path)
    whole = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(whole)
    assert same(bits(UNet2DConditionModel.from_pretrained(tmp_path)), bits(unet))
    assert same(dict(open_weights(tmp_path)), bits(unet))


def test_a_config_is_not_replaced_unasked(unet, delta, tmp_path):
    unet.save_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(WeightWriteError, match=r"config\.json exists"):
        merge_files(tmp_path / "base", delta, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_half_precision_is_rounded_once(make_unet, delta, tmp_path):
    unet = make_unet(torch.bfloat16)
    out = tmp_path / "out.safetensors"
    merge_files(unet.state_dict(), delta, out, scale=0.7)
    merge_delta(unet, delta, 0.7)
    merged = load_file(out)
    assert all(torch.equal(merged[name], weight) for name, weight in unet.state_dict().items())
