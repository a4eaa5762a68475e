"""The card of an artefact of a flow-matching base: its snippet runs, and draws what diffusers draws."""

import re

import numpy as np
import pytest
import torch
from flow_accelerator import BOUNDARIES, changed, drawn_by_diffusers, flow_pipe, make_accelerator
from PIL import Image

from perflow_diffusers import load_perflow
from perflow_diffusers.hub import ArtifactError, export_pipeline


def test_the_snippet_draws_what_diffusers_draws_with_the_changed_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    accelerator = make_accelerator(tmp_path, base_model="miniature")
    card = (accelerator.folder / "README.md").read_text()
    torch.manual_seed(3)
    exec(compile(re.search(r"```python\n(.*?)```", card, re.S).group(1), "README.md", "exec"), {})
    drawn = np.asarray(Image.open("few-steps.png"), dtype=int)
    pipe = changed(flow_pipe())
    torch.manual_seed(3)
    latents = torch.randn(1, 4, 8, 8)
    expected = drawn_by_diffusers(pipe, BOUNDARIES[:-1], latents=latents, prompt="a photo of a cat in the snow")
    assert np.abs(drawn - np.round(expected[0] * 255)).max() <= 1


def test_an_export_says_what_to_do_instead(tmp_path):
    accelerator = make_accelerator(tmp_path)
    pipe = flow_pipe()
    load_perflow(pipe, accelerator.folder)
    with pytest.raises(ArtifactError, match=r"not exported yet.*save_pretrained"):
        export_pipeline(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
