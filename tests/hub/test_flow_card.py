"""The card of an artefact of a flow-matching base: its snippet runs, and draws what diffusers draws."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from flow_accelerator import BOUNDARIES, changed, draw, drawn_by_diffusers, flow_pipe, make_accelerator
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from flow_builders import FLOW

from perflow_diffusers import FlowMatchPeRFlowScheduler, load_perflow, set_scheduler
from perflow_diffusers.hub import ArtifactError, export_pipeline
from perflow_diffusers.hub.export import _sigmas
from perflow_diffusers.miniature import MINIATURE_FLOW_LEFT_OUT


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


LEFT_OUT = dict.fromkeys(MINIATURE_FLOW_LEFT_OUT)


@pytest.mark.parametrize("boundaries", [BOUNDARIES, [1.0, 0.9, 0.5, 0.0]])
@pytest.mark.parametrize("form", ["delta", "lora"])
def test_an_export_draws_the_same_with_diffusers_alone(tmp_path, boundaries, form):
    """Read and called as its card says, by diffusers' own classes, with windows of a static shift and with others."""
    accelerator = make_accelerator(tmp_path, window_boundaries=boundaries, recommended_steps=[len(boundaries) - 1])
    pipe = flow_pipe()
    load_perflow(pipe, accelerator.folder, weights=form)
    wanted = draw(pipe, 6)
    folder = export_pipeline(pipe, tmp_path / "out")
    plain = DiffusionPipeline.from_pretrained(folder, **LEFT_OUT)
    plain.set_progress_bar_config(disable=True)
    assert type(plain.scheduler) is FlowMatchEulerDiscreteScheduler
    assert type(pipe.scheduler) is FlowMatchPeRFlowScheduler  # which stays
    sigmas = _sigmas(pipe.scheduler, 6)
    got = draw(plain, 6, sigmas=sigmas)
    assert np.abs(got - wanted).max() < 1e-4
    plain.scheduler.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(plain.scheduler.sigmas, pipe.scheduler.sigmas, rtol=0, atol=1e-6)
    card = (folder / "README.md").read_text()
    steps = len(boundaries) - 1
    assert f"sigmas={_sigmas(pipe.scheduler, steps)}, num_inference_steps={steps}" in card
    assert "put its steps on the noise levels that the weights were trained for, exactly" in card
    if boundaries is BOUNDARIES:
        assert "sigmas=[1.0, 0.75, 0.5, 0.25]" in card
    set_scheduler(plain)
    assert np.abs(draw(plain, 6) - wanted).max() < 1e-4


def test_the_card_of_a_film_writes_a_film_and_says_that_its_call_takes_no_sigmas(tmp_path):
    pipe = FLOW["wan-text-to-video"](FlowMatchEulerDiscreteScheduler(shift=3.0)).pipe
    pipe.scheduler = FlowMatchPeRFlowScheduler.from_config(pipe.scheduler.config, num_time_windows=4)
    card = (export_pipeline(pipe, tmp_path / "film") / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card
    assert 'from diffusers.utils import export_to_video\n\nframes = pipe("a photo of a cat' in card
    assert '.frames[0]\nexport_to_video(frames, "few-steps.mp4")' in card
    assert "takes no `sigmas`" in card and "sigmas=" not in card


def test_an_export_with_code_is_refused(tmp_path):
    accelerator = make_accelerator(tmp_path)
    pipe = flow_pipe()
    load_perflow(pipe, accelerator.folder)
    with pytest.raises(ArtifactError, match=r"Pass form='plain': for a flow-matching base"):
        export_pipeline(pipe, tmp_path / "out", form="code")
    assert not (tmp_path / "out").exists()
