"""A small original with what its own code computed, a tiny pipeline, and pictures to put in."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from perflow_diffusers.pipelines.wonder3d import UNetMV2DConditionModel, tiny_wonder3d

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def original():
    """`config`, `weights`, and `io` (x, t, ctx, cam and the output y) of the original code at a small size."""
    config = json.loads((DATA / "small_config.json").read_text())
    return config, load_file(DATA / "small_weights.safetensors"), load_file(DATA / "small_io.safetensors")


@pytest.fixture
def original_unet(original):
    """The small original's weights in our UNet."""
    config, weights, _ = original
    unet = UNetMV2DConditionModel.from_config(config).eval().requires_grad_(False)
    unet.load_state_dict(weights)
    return unet


@pytest.fixture(scope="session")
def tiny_unet():
    """Settings and weights of the tiny pipeline's UNet."""
    unet = tiny_wonder3d().unet
    return dict(unet.config), unet.state_dict()


@pytest.fixture
def make_unet(tiny_unet):
    """The tiny UNet, with settings that leave its weights as they are."""

    def make(**settings):
        config, weights = tiny_unet
        unet = UNetMV2DConditionModel.from_config({**config, **settings}).eval().requires_grad_(False)
        unet.load_state_dict(weights, strict=not settings)
        return unet

    return make


@pytest.fixture
def pipe():
    pipeline = tiny_wonder3d()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.requires_grad_(False)
    return pipeline


@pytest.fixture
def picture():
    """32 x 32, a red disc and a blue bar on white."""
    image = Image.new("RGB", (32, 32), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((6, 6, 22, 22), fill="red")
    draw.rectangle((18, 12, 26, 26), fill="blue")
    return image


@pytest.fixture
def seeded():
    return lambda seed: torch.Generator().manual_seed(seed)
