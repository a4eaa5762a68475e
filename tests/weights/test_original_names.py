"""Numbers of original-format names: right for every family and its pruned kin, from the model's list or the LoRA's."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from ldm_names import CONFIGS, ldm_names

from perflow_diffusers.weights.read import lora_names
from perflow_diffusers.weights.read.original_names import (
    blocks_of_layers,
    blocks_of_model,
    blocks_of_originals,
    from_original,
    to_original,
)


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    """A UNet without weights, and {module: original name}."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[request.param])
    return unet, ldm_names(unet)


def attention_only(names):
    return {module: old for module, old in names.items() if "attentions" in module}


def rows(unet, names):
    weights = unet.state_dict()
    return {old: weights[f"{module}.weight"].shape[0] for module, old in names.items()}


def test_the_models_own_list_gives_the_numbers(model):
    unet, names = model
    blocks = blocks_of_model(unet.state_dict())
    assert {module: to_original(module, blocks) for module in names} == names
    assert {old: from_original(old, blocks) for old in names.values()} == {old: new for new, old in names.items()}


@pytest.mark.parametrize("part", [dict, attention_only])
def test_the_layers_of_a_lora_give_the_numbers(model, part):
    names = part(model[1])
    blocks = blocks_of_layers(names)
    assert {module: to_original(module, blocks) for module in names} == names


@pytest.mark.parametrize("part", [dict, attention_only])
def test_the_numbers_of_a_lora_give_the_layers(model, part):
    names = part(model[1])
    blocks, sure = blocks_of_originals(rows(model[0], names))
    assert sure
    assert {old: from_original(old, blocks) for old in names.values()} == {old: new for new, old in names.items()}


def test_words_with_underscores_are_split_as_they_were_joined(model):
    for module, old in model[1].items():
        assert lora_names.dotted(module.replace(".", "_")) == module
        assert lora_names.dotted(old.replace(".", "_")) == old


def test_upsamplers_stand_behind_the_attention_if_there_is_one():
    with torch.device("meta"):
        found = {name: ldm_names(UNet2DConditionModel(**CONFIGS[name])) for name in ("SD 1.5", "SDXL", "SDXL refiner")}
    upsampler = "up_blocks.0.upsamplers.0.conv"
    assert found["SD 1.5"][upsampler] == found["SDXL refiner"][upsampler] == "output_blocks.2.1.conv"
    assert found["SDXL"][upsampler] == "output_blocks.2.2.conv"


def test_layers_that_leave_a_doubt():
    to_q = "transformer_blocks.0.attn1.to_q"
    assert blocks_of_layers([f"up_blocks.1.attentions.0.{to_q}"]) is None  # 3 of SDXL, 2 of KOALA
    assert blocks_of_layers(["up_blocks.0.upsamplers.0.conv"]) is None  # with attention or without
    both = [f"up_blocks.0.attentions.{layer}.{to_q}" for layer in (0, 1)]
    assert [to_original(module, blocks_of_layers(both)) for module in both] == [
        f"output_blocks.{layer}.1.{to_q}" for layer in (0, 1)
    ]
    assert blocks_of_originals({f"output_blocks.3.1.{to_q}": 640}) == (blocks_of_model([]), False)
    assert blocks_of_originals({f"output_blocks.1.1.{to_q}": 640})[1]


def test_blocks_of_different_sizes_are_counted_from_the_model_only():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, layers_per_block=(1, 2, 3, 1))
    names = ldm_names(unet)
    blocks = blocks_of_model(unet.state_dict())
    assert {module: to_original(module, blocks) for module in names} == names
    assert blocks_of_layers(names) is None


def test_names_of_no_place():
    for old in ("input_blocks.4.0.op", "output_blocks.1.1.conv", "output_blocks.2.3.conv", "input_blocks.3.1.proj_in"):
        assert from_original(old) is None
    assert from_original("input_blocks.0.0") == "conv_in" and from_original("input_blocks.0.1.proj_in") is None
