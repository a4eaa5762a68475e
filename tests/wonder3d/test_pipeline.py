"""The pipeline against the original's procedure written out, and its options."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from PIL import Image

from perflow_diffusers.pipelines.wonder3d import Wonder3DPipelineOutput, camera_embeddings

TOLERANCE = 1e-5


@torch.no_grad()
def as_the_original_does(pipe, picture, noise, steps, guidance):
    """12 rows, (domain, view), of one object; with and without the picture in two calls of the network."""
    clip = pipe.feature_extractor(images=[picture] * 12, return_tensors="pt").pixel_values
    embeds = pipe.image_encoder(clip).image_embeds[:, None]
    pixels = torch.from_numpy(np.array([np.asarray(picture)] * 12)).permute(0, 3, 1, 2) / 255 * 2 - 1
    image_latents = pipe.vae.encode(pixels).latent_dist.mode() * 0.18215
    cameras = camera_embeddings().flatten(0, 1)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        given, without = (
            pipe.unet(torch.cat([noise, share * image_latents], 1), t, share * embeds, class_labels=cameras).sample
            for share in (1, 0)
        )
        noise = scheduler.step(without + guidance * (given - without), t, noise).prev_sample
    decoded = pipe.vae.decode(noise / 0.18215).sample
    return noise, (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_does_what_the_original_does(pipe, picture, seeded, guidance):
    noise = torch.randn(12, 4, 8, 8, generator=seeded(5))
    latents, pixels = as_the_original_does(pipe, picture, noise, 3, guidance)
    options = {"num_inference_steps": 3, "guidance_scale": guidance}
    drawn = pipe(picture, generator=seeded(5), output_type="latent", **options)
    assert (torch.cat([drawn.normals, drawn.images]) - latents).abs().max() <= TOLERANCE
    normals, images = pipe(picture, latents=noise, output_type="pt", return_dict=False, **options)
    assert (torch.cat([normals, images]) - pixels).abs().max() <= TOLERANCE


def test_two_pictures_in_one_call_give_what_each_gives_alone(pipe, picture, seeded):
    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_90)]
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    together = pipe(pictures, generator=[seeded(1), seeded(2)], **options)
    for one, seed in enumerate((1, 2)):
        alone = pipe(pictures[one], generator=seeded(seed), **options)
        for domain in ("normals", "images"):
            views = together[domain][6 * one : 6 * one + 6]
            assert (views - alone[domain]).abs().max() <= TOLERANCE
    assert (together.images[:6] - together.images[6:]).abs().max() > 0.01


def test_one_generator_gives_the_first_picture_the_noise_it_has_alone(pipe, seeded):
    together, alone = (pipe.prepare_latents(n, seeded(3), None) for n in (2, 1))
    assert torch.equal(together.unflatten(0, (2, 2, 6))[:, 0].flatten(0, 1), alone)


def test_stochastic_steps_take_a_list_of_generators(pipe, picture, seeded):
    options = {"num_inference_steps": 2, "eta": 1.0, "output_type": "latent"}
    together = pipe([picture] * 2, generator=[seeded(1), seeded(2)], **options)
    alone = pipe(picture, generator=[seeded(2)], **options)
    assert (together.images[6:] - alone.images).abs().max() <= TOLERANCE
    still = pipe(picture, generator=[seeded(2)], **{**options, "eta": 0.0})
    assert (still.images - alone.images).abs().max() > 0.01


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_output_types_hold_the_same_numbers(pipe, picture, seeded, output_type):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    latents = pipe(picture, generator=seeded(0), output_type="latent", **options)
    with torch.no_grad():
        expected = (pipe.vae.decode(latents.images / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    out = pipe(picture, generator=seeded(0), output_type=output_type, **options)
    assert isinstance(out, Wonder3DPipelineOutput) and len(out.normals) == len(out.images) == 6
    if output_type == "pil":
        assert all(view.size == (32, 32) for view in out.images)
        numbers = torch.from_numpy(np.stack([np.asarray(view) for view in out.images])).permute(0, 3, 1, 2) / 255
        assert (numbers - expected).abs().max() <= 0.5 / 255 + TOLERANCE
    else:
        numbers = torch.as_tensor(out.images)
        numbers = numbers.permute(0, 3, 1, 2) if output_type == "np" else numbers
        assert (numbers - expected).abs().max() <= TOLERANCE


def test_callbacks_see_each_step_and_may_change_tensors(pipe, picture, seeded):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    names = ["latents", "image_embeds", "image_latents", "camera_embeds"]
    out = pipe(
        picture,
        num_inference_steps=2,
        output_type="latent",
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    assert seen == [(step, int(t), sorted(names)) for step, t in enumerate(pipe.scheduler.timesteps)]
    assert not out.images.any() and not out.normals.any()


def test_a_callback_can_stop_the_run(pipe, picture):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = True

    pipe(picture, num_inference_steps=3, output_type="latent", callback_on_step_end=callback)
    assert steps == [0] and pipe.num_timesteps == 3


def test_the_progress_bar_counts_the_steps(pipe, picture, monkeypatch):
    bars = []
    real = pipe.progress_bar

    def progress_bar(*args, **kwargs):
        bars.append(real(*args, **kwargs))
        return bars[-1]

    monkeypatch.setattr(pipe, "progress_bar", progress_bar)
    pipe.set_progress_bar_config(disable=False, file=open("/dev/null", "w"))  # noqa: SIM115
    pipe(picture, num_inference_steps=3, output_type="latent")
    assert (bars[0].n, bars[0].total) == (3, 3)
    pipe._progress_bar_config["file"].close()


def test_only_the_noisy_half_is_scaled_for_schedulers_that_scale(pipe, picture, monkeypatch):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    seen = []
    forward = type(pipe.unet).forward

    def record(self, sample, *args, **kwargs):
        seen.append(sample)
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "forward", record)
    noise = torch.ones(12, 4, 8, 8)
    pipe(picture, num_inference_steps=1, latents=noise, output_type="latent")
    sigma = pipe.scheduler.sigmas[0]
    scaled = pipe.scheduler.init_noise_sigma / (sigma**2 + 1) ** 0.5
    assert torch.allclose(seen[0][:, :4], scaled * noise)
    image_latents = pipe.encode_image([picture])[1][0, 0]
    assert all(torch.allclose(row[4:], image_latents, atol=TOLERANCE) for row in seen[0])


def test_offloading_gives_the_same_pictures(pipe, picture, seeded):
    options = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "pt"}
    before = pipe(picture, generator=seeded(0), **options)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipe(picture, generator=seeded(0), **options).images, before.images)
    models = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert set(pipe.model_cpu_offload_seq.split("->")) == models


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_type": "jpg"}, "`output_type='jpg'`; expected one of pil"),
        ({"num_inference_steps": 0}, "`num_inference_steps=0`; expected a whole number from 1"),
        ({"num_inference_steps": -1}, "`num_inference_steps=-1`"),
        ({"num_inference_steps": 2.5}, r"`num_inference_steps=2.5`"),
        ({"guidance_scale": float("nan")}, "`guidance_scale=nan`; expected a finite number"),
        ({"guidance_scale": "3"}, "`guidance_scale='3'`"),
        ({"image": torch.full((3, 32, 32), float("nan"))}, "values from nan to nan; expected 0 to 1"),
        ({"latents": torch.zeros(6, 4, 8, 8)}, r"expected \(12, 4, 8, 8\)"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 pictures"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "names prompt_embeds; expected some of latents"),
        ({"camera_embeds": torch.zeros(2, 4, 10)}, r"shape \(2, 4, 10\) for a network that takes \(2, 6, 10\)"),
    ],
)
def test_unusable_arguments_are_refused(pipe, picture, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"image": picture, "num_inference_steps": 1, **options})


def test_a_pipeline_without_its_network_says_so(pipe, picture):
    pipe.register_modules(unet=None)
    with pytest.raises(ValueError, match="has no UNet"):
        pipe(picture)
