"""SDXL base and refiner share one run: `denoising_end` and `denoising_start` cut the same list of timesteps."""

import builders
import diffusers
import pytest
import torch
from cases import CASES, GUIDANCE, WHOLE
from replay import close, guided, recorded, replayed

from perflow_diffusers import PeRFlowScheduler

BASE = next(case for case in CASES if case.name == "sdxl-text-to-image")

# (steps, denoising_end = denoising_start, how many steps the base takes): those that begin at or above 1000 (1 - end).
CUTS = [(4, 0.3, 2), (4, 0.5, 3), (8, 0.5, 5), (8, 0.8, 7), (5, 0.7, 4)]


def image_to_image(components):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def base_then(pipe, refiner, n, cut):
    """The base's latents at the cut, and the refiner's at the end."""
    handed = BASE.call(pipe, n, denoising_end=cut)
    prompts = {"prompt": ["a ninja"] * 2, "negative_prompt": ["blue"] * 2} if refiner.text_encoder is None else {}
    return handed, BASE.call(refiner, n, denoising_start=cut, image=handed, **prompts)


@pytest.mark.parametrize(("n", "cut", "first"), CUTS)
def test_one_network_in_two_halves_lands_where_one_run_lands(n, cut, first, built, drawn):
    pipe, _ = built(BASE)
    second = image_to_image(builders.xl())
    with recorded(pipe.unet) as seen:
        _, images = base_then(pipe, second, n, cut)
    assert seen.timesteps == WHOLE[n]
    assert seen.noised == []
    assert torch.equal(images, drawn(BASE, n))


@pytest.mark.parametrize(("n", "cut", "first"), CUTS)
def test_every_timestep_is_seen_once_by_the_base_or_the_refiner(n, cut, first, built):
    pipe, _ = built(BASE)
    second = image_to_image(builders.refiner())
    with recorded(pipe.unet) as early, recorded(second.unet) as late:
        handed, images = base_then(pipe, second, n, cut)
    assert (early.timesteps, late.timesteps) == (WHOLE[n][:first], WHOLE[n][first:])
    keep = BASE.kept()
    points = [*WHOLE[n], 0]

    def guide(chunks):
        return guided(chunks, GUIDANCE)

    assert close(handed, replayed(early, "ddim_eps", points[: first + 1], guide, 2, keep))
    assert torch.equal(late.inputs[0][:2], handed)
    early.outputs += late.outputs
    assert close(images, replayed(early, "ddim_eps", points, guide, 2, keep))


@pytest.mark.parametrize(("n", "cut"), [(4, 0.8), (1, 0.5)])
def test_a_cut_below_the_last_timestep_leaves_the_refiner_nothing_and_says_so(n, cut, built, drawn):
    pipe, _ = built(BASE)
    second = image_to_image(builders.refiner())
    handed = BASE.call(pipe, n, denoising_end=cut)
    assert torch.equal(handed, drawn(BASE, n))
    with pytest.raises(ValueError, match=r"no timestep of \[1000.*\] lies below the cut: lower `denoising_start`"):
        BASE.call(second, n, denoising_start=cut, image=handed, prompt="a ninja", negative_prompt="blue")


def test_the_refiner_keeps_its_scheduler_when_it_is_saved(tmp_path):
    second = image_to_image(builders.refiner())
    second.scheduler = PeRFlowScheduler.from_config(second.scheduler.config, perflow_type="ddim_eps")
    second.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.StableDiffusionXLImg2ImgPipeline
    assert loaded.scheduler.config.perflow_type == "ddim_eps"
