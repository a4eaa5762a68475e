"""What the commands remark beside their result."""

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from perflow_diffusers.cli import app
from perflow_diffusers.miniature import miniature_folder

BASE, TUNED = (str(miniature_folder() / name / "unet") for name in ("avatars", "disco"))


def notes(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return [line for line in result.stderr.splitlines() if ": note: " in line]


def test_diff_of_a_model_and_itself_and_without_a_type(tmp_path):
    (said,) = notes("diff", BASE, BASE, tmp_path / "same.safetensors")
    assert "nothing differs" in said
    (said,) = notes("diff", BASE, TUNED, tmp_path / "other.safetensors")
    assert "--prediction-type" in said
    assert not notes("diff", BASE, TUNED, tmp_path / "typed.safetensors", "--prediction-type", "ddim_eps")


@pytest.mark.parametrize(("rank", "larger"), [(2, False), (80, True)])
def test_a_lora_larger_than_its_delta(rank, larger, tmp_path):
    """A layer of 96 x 96 at rank 80 takes 160 x 96 numbers."""
    base = {f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{x}.weight": torch.zeros(96, 96) for x in "qkv"}
    tuned = {name: torch.randn(96, 96) for name in base}
    for name, weights in (("base", base), ("tuned", tuned)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    delta = tmp_path / "delta.safetensors"
    words = [tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", delta, "--dtype", "float16"]
    notes("diff", *words, "--prediction-type", "ddim_eps")
    said = notes("extract-lora", delta, tmp_path / "l.safetensors", "--rank", rank)
    assert any("larger than its delta" in line for line in said) == larger
