"""PeRFlowScheduler inside stock StableDiffusionPipeline and StableDiffusionImg2ImgPipeline."""

from itertools import pairwise

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from perflow_diffusers.flow import euler, marginal
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler

GUIDANCE = 4.5


@pytest.fixture
def pipe(tiny_pipeline):
    tiny_pipeline.scheduler = PeRFlowScheduler.from_config(tiny_pipeline.scheduler.config, prediction_type="ddim_eps")
    return tiny_pipeline


@pytest.fixture
def calls(tiny_components):
    """The timesteps that the UNet is called with."""
    seen = []
    handle = tiny_components[0].register_forward_pre_hook(lambda module, args: seen.append(int(args[1])))
    yield seen
    handle.remove()


def latents(batch=2):
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def draw(pipe, embeddings, **options):
    return pipe(**embeddings, guidance_scale=GUIDANCE, output_type="latent", **options).images


@torch.no_grad()
def by_hand(pipe, embeddings, z, points):
    """Guided sampling over falling timesteps, in float64 outside the network."""
    text = torch.cat([embeddings["negative_prompt_embeds"], embeddings["prompt_embeds"]])
    for t, t_next in pairwise(points):
        plain, guided = pipe.unet(torch.cat([z, z]).float(), t, text).sample.chunk(2)
        start, end = pipe.scheduler.windows.span(t, t_next)
        a, b = euler(pipe.scheduler.path, "ddim_eps", start, end, t, t_next)
        z = a * z.double() + b * (plain + GUIDANCE * (guided - plain)).double()
    return z.float()


@pytest.mark.parametrize(
    ("n", "timesteps"),
    [
        (4, [1000, 750, 500, 250]),
        (5, [1000, 875, 750, 500, 250]),
        (8, [1000, 875, 750, 625, 500, 375, 250, 125]),
    ],
)
def test_text_to_image(pipe, embeddings, calls, n, timesteps):
    images = draw(pipe, embeddings, latents=latents(), num_inference_steps=n)
    assert calls == timesteps
    assert torch.allclose(images, by_hand(pipe, embeddings, latents(), [*timesteps, 0]), rtol=1e-4, atol=1e-4)


def test_fewer_steps_than_windows(pipe, embeddings, calls):
    with pytest.warns(UserWarning, match="1 steps? for weights with 4 time windows"):
        images = draw(pipe, embeddings, latents=latents(), num_inference_steps=1)
    assert calls == [1000]
    assert torch.allclose(images, by_hand(pipe, embeddings, latents(), [1000, 0]), rtol=1e-4, atol=1e-4)


def test_explicit_timesteps(pipe, embeddings, calls):
    draw(pipe, embeddings, latents=latents(), timesteps=[1000, 750, 250])
    assert calls == [1000, 750, 250]


def test_determinism_and_batches(pipe, embeddings):
    first, second = (draw(pipe, embeddings, latents=latents(), num_inference_steps=4) for _ in range(2))
    assert torch.equal(first, second)
    for i in range(2):
        one = {name: e[i : i + 1] for name, e in embeddings.items()}
        alone = draw(pipe, one, latents=latents()[i : i + 1], num_inference_steps=4)
        assert torch.allclose(alone, first[i : i + 1], rtol=1e-4, atol=1e-4)


def test_pictures_come_out(pipe, embeddings):
    images = pipe(**embeddings, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(32, 32)] * 2


def test_save_and_load(pipe, embeddings, tmp_path):
    expected = draw(pipe, embeddings, latents=latents(), num_inference_steps=5)
    pipe.save_pretrained(tmp_path)
    for loader in (StableDiffusionPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is PeRFlowScheduler
        assert loaded.scheduler.config.perflow_type == "ddim_eps"
        assert torch.equal(draw(loaded, embeddings, latents=latents(), num_inference_steps=5), expected)


@pytest.mark.parametrize(
    ("n", "strength", "timesteps"),
    [
        (4, 1.0, [1000, 750, 500, 250]),
        (4, 0.5, [500, 250]),
        (8, 0.4, [375, 250, 125]),
        (5, 0.85, [875, 750, 500, 250]),
    ],
)
def test_image_to_image(pipe, embeddings, calls, n, strength, timesteps):
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 32, 32, generator=generator)
    images = draw(
        pipe,
        embeddings,
        image=image,
        strength=strength,
        num_inference_steps=n,
        generator=torch.Generator().manual_seed(5),
    )
    assert calls == timesteps
    # The same start by hand: encode, then noise onto the chord of the first timestep's window.
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        posterior = pipe.vae.encode(pipe.image_processor.preprocess(image)).latent_dist
    x0 = posterior.sample(generator) * pipe.vae.config.scaling_factor
    noise = torch.randn(x0.shape, generator=generator)
    c_x0, c_noise = marginal(pipe.scheduler.path, *pipe.scheduler.windows.of(timesteps[0]), timesteps[0])
    expected = by_hand(pipe, embeddings, c_x0 * x0.double() + c_noise * noise.double(), [*timesteps, 0])
    assert torch.allclose(images, expected, rtol=1e-4, atol=1e-4)


def test_image_to_image_with_too_little_strength_says_so(pipe, embeddings):
    pipe = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="strength \\* num_inference_steps < 1"):
        draw(pipe, embeddings, image=torch.rand(2, 3, 32, 32), strength=0.2, num_inference_steps=4)
