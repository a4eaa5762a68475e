"""A tiny UNet with random weights, a delta for it, and both as files."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_files import WRITERS, random_factors
from safetensors.torch import save_file

CONFIG = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}


@pytest.fixture
def make_unet() -> Callable[..., UNet2DConditionModel]:
    def make(dtype=torch.float32, seed=0, **changes):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**CONFIG, **changes}).eval().requires_grad_(False)
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        return unet.to(dtype)

    return make


@pytest.fixture
def unet(make_unet):
    return make_unet()


@pytest.fixture
def make_delta() -> Callable[..., dict[str, torch.Tensor]]:
    def make(unet, dtype=torch.float16, seed=1, size=0.01):
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (torch.randn(weight.shape, generator=generator) * size).to(dtype)
            for name, weight in unet.state_dict().items()
        }

    return make


@pytest.fixture
def delta(unet, make_delta):
    return make_delta(unet)


@pytest.fixture
def delta_file(delta, tmp_path):
    path = tmp_path / "delta.safetensors"
    metadata = {"format": "pt", "perflow_format": "delta-1", "prediction_type": "ddim_eps", "steps": "4"}
    save_file(delta, path, metadata)
    return path


@pytest.fixture
def bits() -> Callable[..., dict[str, torch.Tensor]]:
    """Copies of all weights; `same(a, b)` of two such dicts compares every bit."""

    def copy(unet):
        return {name: weight.detach().clone() for name, weight in unet.state_dict().items()}

    return copy


@pytest.fixture
def same() -> Callable[..., bool]:
    def compare(first, second):
        return first.keys() == second.keys() and all(
            first[name].dtype == second[name].dtype
            and torch.equal(
                first[name].contiguous().reshape(-1).view(torch.uint8),
                second[name].contiguous().reshape(-1).view(torch.uint8),
            )
            for name in first
        )

    return compare


@pytest.fixture
def factors(unet):
    return random_factors(unet)


@pytest.fixture(params=list(WRITERS))
def lora_file(request, factors, tmp_path):
    suffix = "" if request.param == "peft" else ".safetensors"
    return WRITERS[request.param](tmp_path / f"style{suffix}", factors)
