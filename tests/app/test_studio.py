"""What the page draws with: exact, interruptible, and said in Python that draws the same."""

import dataclasses
import warnings

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

from perflow_diffusers import PeRFlowScheduler, load_miniature
from perflow_diffusers.app.code import as_python
from perflow_diffusers.app.drawing import Interrupted
from perflow_diffusers.app.settings import SAME, Settings, SettingsError
from perflow_diffusers.app.studio import Studio
from perflow_diffusers.schedulers.stock import stock_scheduler

PROMPT = "a happy person with red hair and glasses"


@pytest.fixture(scope="module")
def studio():
    return Studio.miniature()


@pytest.fixture(scope="module")
def plain():
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(one, other):
    return (np.asarray(one) == np.asarray(other)).all()


def test_strength_0_is_the_checkpoint_itself_and_1_is_the_accelerator_again(studio, plain):
    settings = Settings(PROMPT, seed=5, steps=4, guidance_scale=3.0)
    full = studio.draw(settings).picture
    none = studio.draw(dataclasses.replace(settings, accelerator_scale=0.0)).picture
    former, plain.scheduler = plain.scheduler, PeRFlowScheduler.from_config(studio.pipe.scheduler.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = plain(PROMPT, num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(5))
    plain.scheduler = former
    assert same(none, expected.images[0]) and not same(none, full)
    for scale in (0.3, 1.5, 0.0):
        studio.draw(dataclasses.replace(settings, accelerator_scale=scale))
    assert same(studio.draw(settings).picture, full)


def test_the_comparison_is_plain_diffusers(studio, plain):
    settings = Settings(PROMPT, seed=7, stock="UniPC", stock_steps=5)
    former, plain.scheduler = plain.scheduler, stock_scheduler("UniPC", plain.scheduler.config)
    expected = plain(PROMPT, num_inference_steps=5, guidance_scale=7.5, generator=torch.Generator().manual_seed(7))
    plain.scheduler = former
    drawing = studio.draw_stock(settings)
    assert same(drawing.picture, expected.images[0])
    assert drawing.evaluations == 10 and studio.draw_stock(settings) is drawing
    assert isinstance(studio.pipe.scheduler, PeRFlowScheduler)


def test_the_same_solver_at_strength_0_is_the_comparison(studio):
    settings = Settings(PROMPT, accelerator_scale=0.0, stock=SAME, stock_guidance_scale=1.0)
    assert same(studio.draw(settings).picture, studio.draw_stock(settings).picture)


def test_a_studio_without_a_second_unet_draws_the_same_comparison(studio):
    settings = Settings(PROMPT, seed=9)
    expected, picture = studio.draw_stock(settings).picture, studio.draw(settings).picture
    second, studio.second = studio.second, None
    studio._kept.clear()
    try:
        assert same(studio.draw_stock(settings).picture, expected)
        assert same(studio.draw(settings).picture, picture)
    finally:
        studio.second = second


def test_the_states_end_in_the_picture(studio):
    drawing = studio.draw(Settings(PROMPT, steps=6))
    states = studio.states(drawing)
    assert len(states) == 6 and drawing.evaluations == 6
    errors = [np.abs(np.asarray(s, float) - np.asarray(drawing.picture, float)).mean() for s in states]
    assert errors[-1] < 2 and errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("draw", ["draw", "draw_stock"])
def test_an_interrupted_picture_leaves_all_as_it_was(studio, draw):
    settings = Settings(PROMPT, seed=21, stock_steps=8, steps=8)
    seen = []

    def cancelled(step, steps):
        seen.append((step, steps))
        return step == 2

    studio._kept.clear()
    expected = studio.draw(settings).picture
    with pytest.raises(Interrupted):
        getattr(studio, draw)(settings, None, cancelled)
    assert seen == [(1, 8), (2, 8)]
    assert same(studio.draw(settings).picture, expected) and "step" not in vars(studio.pipe.scheduler)
    assert not studio.pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("scale", [1.0, 0.45])
@pytest.mark.parametrize("image", [False, True])
def test_the_python_draws_the_same_pixels(studio, tmp_path, monkeypatch, scale, image):
    monkeypatch.chdir(tmp_path)
    settings = Settings('a sad person with a "purple" hat', seed=3, steps=5, accelerator_scale=scale)
    source = None
    if image:
        source = Image.effect_noise((80, 60), 90).convert("RGB")
        source.save("input.png")
        settings = dataclasses.replace(settings, strength=0.7)
    drawing = studio.draw(settings, source)
    code = as_python(settings, studio, "input.png" if image else None)
    exec(compile(code, "shown", "exec"), {"__name__": "__main__"})
    assert same(Image.open("picture.png"), drawing.picture)


def test_a_prompt_that_is_too_long_is_said(studio):
    with pytest.raises(SettingsError, match="reads"):
        studio.draw(Settings("hat " * 200))


def test_weights_that_are_offloaded_one_by_one_come_home_for_another_strength(monkeypatch):
    """Nothing can be added to weights that are on the meta device, where such an offload leaves them."""
    studio = Studio.miniature()
    studio.second, studio.offload, studio.device = None, "sequential", "cpu"
    pipe, done = studio.pipe, []
    at_1 = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}

    def offload(device):
        done.append((device, pipe.unet.conv_in.weight.is_meta))
        accelerate.cpu_offload(pipe.unet, torch.device(device))

    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", offload)
    offload("cpu")
    assert pipe.unet.conv_in.weight.is_meta
    for scale in (0, 0.5, 1):
        studio._rescale(scale)
    assert done == [("cpu", False)] * 4 and pipe.unet.conv_in.weight.is_meta
    pipe.remove_all_hooks()
    assert all(torch.equal(weight, at_1[name]) for name, weight in pipe.unet.state_dict().items())
