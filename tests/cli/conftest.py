"""A base and a tuned tiny UNet as folders, and a runner of the command."""

import pytest
import torch
from typer.testing import CliRunner

from perflow_diffusers.cli import app


@pytest.fixture
def perflow():
    """perflow(*words) -> result with exit_code and output."""
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="session")
def folders(tiny_components, tmp_path_factory):
    """(base, tuned): two UNet folders that differ in every weight by a small random number."""
    import copy

    place = tmp_path_factory.mktemp("unets")
    base, tuned = tiny_components[0], copy.deepcopy(tiny_components[0])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.01)
    base.save_pretrained(place / "base")
    tuned.save_pretrained(place / "tuned")
    return place / "base", place / "tuned"
