"""DoRA: directions with magnitudes, against PEFT."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter_config import peft_model, saved, trained, weights_of
from test_lora import output, relative
from test_lora_kin import TARGETS, peft_adapter

from perflow_diffusers.weights import (
    WeightSourceError,
    extract_lora,
    merge_delta,
    merge_files,
    open_weights,
    set_delta_scale,
    unmerge_delta,
)
from perflow_diffusers.weights.read.lora import as_delta

peft = pytest.importorskip("peft")


def dora(unet, folder):
    saved(peft_adapter(unet, "lora", {"use_dora": True}), folder)
    return folder


def dora_changes(unet, folder):
    """{weight: W' - W} in float64 from the formula of the paper, W the weights of `unet`."""
    tensors = {
        key.removeprefix("base_model.model."): value.double()
        for key, value in load_file(folder / "adapter_model.safetensors").items()
    }
    found = {}
    for key, magnitude in tensors.items():
        if "lora_magnitude_vector" in key:
            module = key.partition(".lora_magnitude_vector")[0]
            base = unet.state_dict()[f"{module}.weight"].double()
            down, up = (tensors[f"{module}.lora_{one}.weight"].flatten(1) for one in "AB")
            whole = base.flatten(1) + up @ down * (5 / 3)
            whole = magnitude.reshape(-1, 1) * whole / whole.norm(dim=1, keepdim=True)
            found[f"{module}.weight"] = whole.reshape(base.shape) - base
    return found


def test_scale_takes_a_share_of_the_whole_change_of_a_dora(unet, tmp_path):
    """As ComfyUI: base + strength (W' - W), so it can be rescaled without the norm in between."""
    changes = dora_changes(unet, dora(unet, tmp_path / "dora"))
    before = weights_of(unet)
    merge_delta(unet, tmp_path / "dora", 0.3)
    for scale in (0.3, -2.0, 1.0):
        set_delta_scale(unet, scale)
        for name, change in changes.items():
            assert torch.allclose(unet.state_dict()[name].double(), before[name].double() + scale * change, atol=2e-6)


@pytest.mark.parametrize("backup", ["cpu", "disk"])
def test_a_dora_among_other_merges_is_that_of_the_base(make_unet, make_delta, bits, same, tmp_path, backup):
    """In any order, at any scale: W is the weight before all merges, so the sum does not depend on what came first."""
    first, second = make_unet(), make_unet()
    before, delta = bits(first), make_delta(first, dtype=torch.float32)
    dora(first, tmp_path / "dora")
    changes = dora_changes(first, tmp_path / "dora")
    handles = [merge_delta(first, delta, backup=backup), merge_delta(first, tmp_path / "dora", backup=backup)]
    handles[0].set_scale(0.5)
    merge_delta(second, tmp_path / "dora", backup=backup)
    merge_delta(second, delta, 0.5, backup=backup)
    with pytest.warns(UserWarning, match="merged into this UNet already"):
        merge_delta(second, tmp_path / "dora", backup=backup)
    unmerge_delta(second)
    for name, change in changes.items():
        wanted = before[name].double() + 0.5 * delta[name].double() + change
        assert torch.allclose(first.state_dict()[name].double(), wanted, atol=2e-6)
        assert torch.allclose(second.state_dict()[name].double(), wanted, atol=2e-6)
    source, name = handles[1].plan.source, next(iter(changes))
    again = pickle.loads(pickle.dumps(source)).near(name, torch.device("cpu"), before[name])
    assert torch.equal(again, source.near(name, torch.device("cpu"), before[name]))
    copied = copy.deepcopy(first)
    for unet in (first, second, copied):
        unmerge_delta(unet)
        unmerge_delta(unet)
        assert same(bits(unet), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_dora_from_file_to_file_and_for_good(make_unet, bits, same, tmp_path, dtype):
    unet, other = make_unet(dtype), make_unet(dtype)
    dora(make_unet(), tmp_path / "dora")
    save_file(bits(unet), tmp_path / "base.safetensors")
    merge_files(tmp_path / "base.safetensors", tmp_path / "dora", tmp_path / "out.safetensors", scale=0.9)
    merge_delta(unet, tmp_path / "dora", 0.9)
    merge_delta(other, tmp_path / "dora", 0.9, backup="none")
    assert same(load_file(tmp_path / "out.safetensors"), bits(unet)) and same(bits(other), bits(unet))


def test_a_dora_alone_is_no_delta(unet, tmp_path):
    path = dora(unet, tmp_path / "dora")
    for call in (
        lambda: extract_lora(path, tmp_path / "l.safetensors", rank=2),
        lambda: as_delta(open_weights(path)),
    ):
        with pytest.raises(WeightSourceError, match=r"DoRA.*depends on the weights of the base.*merge_files\(base"):
            call()


def test_a_dora_on_more_input_channels(make_unet, tmp_path):
    """The first channels of a wider conv_in get what the plain conv_in would get."""
    plain, wide = make_unet(), make_unet(in_channels=9)
    wide.conv_in.weight[:, :4] = plain.conv_in.weight
    before = wide.conv_in.weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules=["conv_in"], use_dora=True, init_lora_weights=False)
    saved(trained(peft_model(plain, config)), tmp_path / "dora")
    merge_delta(wide, tmp_path / "dora")
    merge_delta(plain, tmp_path / "dora")
    assert torch.allclose(wide.conv_in.weight[:, :4], plain.conv_in.weight, atol=1e-6)
    assert torch.equal(wide.conv_in.weight[:, 4:], before[:, 4:])


def test_rows_of_zeros_stay(unet):
    stem, weight = "lora_unet_conv_in", unet.conv_in.weight
    weight[0] = 0
    up = torch.ones(8, 1, 1, 1)
    up[0] = 0
    source = {f"{stem}.lora_down.weight": torch.ones(1, 4, 3, 3), f"{stem}.lora_up.weight": up}
    source[f"{stem}.dora_scale"] = torch.ones(8, 1, 1, 1)
    merge_delta(unet, source)
    assert torch.equal(weight[0], torch.zeros(4, 3, 3)) and weight.isfinite().all()


def test_a_config_that_promises_magnitudes(unet, tmp_path):
    path = dora(unet, tmp_path / "dora")
    tensors = load_file(path / "adapter_model.safetensors")
    lone = next(key for key in tensors if "magnitude" in key)
    save_file({key: value for key, value in tensors.items() if key != lone}, path / "adapter_model.safetensors")
    with pytest.raises(WeightSourceError, match=r"use_dora.*1 layers have no magnitude"):
        merge_delta(unet, path)


def test_a_header_of_diffusers_with_a_dora(unet, make_unet, tmp_path):
    """`save_lora_adapter` of a live DoRA: names and config without the component, magnitudes among them."""
    torch.manual_seed(5)
    live = make_unet()
    live.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True, init_lora_weights=False)
    )
    trained(live)
    live.save_lora_adapter(tmp_path / "lora")
    assert json.loads(open_weights(tmp_path / "lora").metadata["lora_adapter_metadata"])["use_dora"]
    merge_delta(unet, tmp_path / "lora")
    assert relative(output(unet), output(live)) < 2e-6
