"""LoRAs that cannot be merged are refused with a way out, and leave every bit as it was."""

import pytest
import torch
from lora_files import (
    random_factors,
    write_diffusers,
    write_kohya,
)
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import (
    MergeError,
    WeightSourceError,
    merge_delta,
)

KIN = {
    "lora_unet_conv_in.oft_blocks": "OFT",
    "conv_in.oft_R.default.weight": "OFT",
    "lora_unet_conv_in.a1.weight": "GLoRA",
    "lora_unet_conv_in.on_input": "IA3",
    "diffusion_model.input_blocks.0.0.set_weight": "whole-weight",
}


@pytest.mark.parametrize("name", list(KIN))
def test_kin_of_lora_are_refused_with_a_way_out(unet, bits, same, factors, tmp_path, name):
    before = bits(unet)
    tensors = {**load_file(write_diffusers(tmp_path / "l.safetensors", factors)), name: torch.ones(1)}
    for given in (tensors, {name: torch.ones(1), "lora_unet_conv_in.alpha": torch.ones(())}):
        with pytest.raises(WeightSourceError, match=f"1 {KIN[name]} tensors.*compute_delta"):
            merge_delta(unet, given)
    assert same(bits(unet), before)


@pytest.fixture
def refused(unet, bits, same):
    def check(source, match, error=WeightSourceError):
        before = bits(unet)
        with pytest.raises(error, match=match):
            merge_delta(unet, source)
        assert same(bits(unet), before)

    return check


def test_loras_that_are_damaged(refused, factors, tmp_path):
    good = load_file(write_diffusers(tmp_path / "l.safetensors", factors))
    down, up = "unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight"
    refused({name: value for name, value in good.items() if name != up}, r"1 layers .* lack one.*conv_in")
    refused({**good, "unet.what.is_this": torch.ones(1)}, "called like nothing in a LoRA.*unet.what.is_this")
    refused({**good, "unet.conv_in.lora.down.weight": good[down]}, "more than one tensor for the same factor")
    refused({**good, down: good[down][:1]}, r"conv_in .* do not belong together .*\(1, 4, 3, 3\)")
    refused({**good, down: good[down][:0], up: good[up][:, :0]}, "do not belong together")
    refused({**good, down: good[down].to(torch.int8)}, "int8, not floating point")
    refused({**good, "unet.conv_in.alpha": torch.ones(2)}, "not one number")
    save_file(good, tmp_path / "l.safetensors", {"lora_adapter_metadata": "{broken"})
    refused(tmp_path / "l.safetensors", "LoRA config .* cannot be read")
    for config in (
        '{"unet.alpha_pattern": {"(": 1}}',
        '{"unet.alpha_pattern": [1]}',
        '["r"]',
        '{"unet.lora_alpha": "x"}',
    ):
        save_file(good, tmp_path / "l.safetensors", {"lora_adapter_metadata": config})
        refused(tmp_path / "l.safetensors", "LoRA config .* cannot be read")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["down", "up", "alpha"])
def test_factors_that_are_not_finite(refused, unet, factors, tmp_path, value, which):
    factors = random_factors(unet, torch.float16)
    down, up, alpha = factors["conv_in"]
    if which == "alpha":
        alpha = value
    else:
        {"down": down, "up": up}[which].view(-1)[-1] = value
    path = write_kohya(tmp_path / "k.safetensors", {**factors, "conv_in": (down, up, alpha)})
    refused(path, r"NaN or Inf in 1 tensors: conv_in\.weight", MergeError)


def test_products_that_overflow(make_unet, bits, same, factors, tmp_path):
    """Bounds that are too cautious are not the reason: large factors whose products cancel are merged."""
    unet = make_unet(torch.float16)
    before = bits(unet)
    large = {"conv_in": (torch.full((2, 4, 3, 3), 300.0), torch.full((8, 2, 1, 1), 300.0), 2.0)}
    with pytest.raises(MergeError, match="overflow"):
        merge_delta(unet, write_kohya(tmp_path / "k.safetensors", large))
    assert same(bits(unet), before)
    signs = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1)
    cancelling = {"conv_in": (large["conv_in"][0], large["conv_in"][1] * signs, 2.0)}
    merge_delta(unet, write_kohya(tmp_path / "c.safetensors", cancelling))
    assert same(bits(unet), before)


def test_loras_of_another_model(refused, make_unet, tmp_path):
    other = random_factors(make_unet(cross_attention_dim=2048))
    refused(write_kohya(tmp_path / "k.safetensors", other), "delta is for SDXL.*", MergeError)
    deep = {"down_blocks.7.resnets.0.conv1": other["mid_block.resnets.0.conv1"]}
    refused(write_kohya(tmp_path / "k.safetensors", deep), r"Not in the model \(1\).*down_blocks\.7", MergeError)


def test_truncated_lora(refused, factors, tmp_path):
    path = write_kohya(tmp_path / "k.safetensors", factors)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "not an intact safetensors file")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interruption_restores_every_bit(make_unet, bits, same, lora_file, monkeypatch, error):
    from perflow_diffusers.weights.read import lora

    unet = make_unet(torch.float16)
    before, real, calls = bits(unet), lora._product, []

    def fail_in_the_middle(*given):
        calls.append(given)
        if len(calls) == 40:
            raise error("stop")
        return real(*given)

    monkeypatch.setattr(lora, "_product", fail_in_the_middle)
    with pytest.raises(error):
        merge_delta(unet, lora_file)
    assert same(bits(unet), before)
