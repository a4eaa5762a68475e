"""One suite for every row of the table in docs/pipelines.md: each pipeline called with a PeRFlowScheduler."""

import pytest
import torch
from cases import BATCH, CASES, GUIDANCE, STRENGTH
from replay import close, on_the_chord, recorded, states

from perflow_diffusers import PeRFlowScheduler

STEPS = (1, 4, 5, 8)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_n = pytest.mark.parametrize("n", STEPS)


def settings(config):
    """What a scheduler's config says, without diffusers' bookkeeping."""
    return {k: v for k, v in config.items() if not k.startswith("_")}


def first_noise(case):
    """What the generators give for the start; where a picture is encoded, its sample was drawn before."""
    shape = case.latent_shape
    if case.frames_first:
        shape = (shape[1], shape[0], *shape[2:])
    generators = [torch.Generator().manual_seed(20 + i) for i in range(BATCH)]
    for _ in range(2 if case.strength else 1):
        noise = torch.cat([torch.randn(1, *shape, generator=g) for g in generators])
    return noise


@every_n
@every_case
def test_timesteps_guidance_and_every_step_are_those_of_a_run_by_hand(case, n, built):
    pipe, _ = built(case)
    with recorded(pipe.unet) as seen:
        images = case.draw(pipe, n)
    timesteps = case.timesteps(n) or [1000]
    assert seen.timesteps == timesteps
    points = [*timesteps, 0]
    start, noise = seen.inputs[0][:BATCH, :4], first_noise(case)
    if seen.noised:
        x0, noise_used, t = seen.noised[0]
        assert torch.equal(noise_used, noise) and t == points[0]
        noised = on_the_chord(x0, noise, *points[:2])
        assert close(start, noised.transpose(1, 2) if case.frames_first else noised)
    else:
        assert torch.equal(start, noise)
    # One step of inpainting from pure noise asks for no noised picture: what is kept is the picture itself.
    keep = case.kept()
    part = 1 - keep if not seen.noised else 1
    keep = keep if seen.noised else 0 * keep
    *before, expected = states(
        seen, case.perflow_type, points, lambda chunks: case.guide(chunks, GUIDANCE), BATCH, keep
    )
    assert all(close(given[:BATCH, :4], z) for given, z in zip(seen.inputs, before, strict=True))
    assert images.shape == (BATCH, *case.latent_shape)
    assert close(part * images, part * expected)


@every_n
@every_case
def test_one_generator_gives_one_result_and_images_do_not_depend_on_their_batch(case, n, built, drawn):
    pipe, together = built(case)[0], drawn(case, n)
    assert torch.equal(case.draw(pipe, n), together)
    for i in range(BATCH):
        assert close(case.draw(pipe, n, rows=(i,)), together[i : i + 1], 1e-4)
    assert not close(together[:1], together[1:], 0.1)


@every_case
def test_prompts_and_conditions_take_part(case, built, drawn):
    pipe, images = built(case)[0], drawn(case, 4)
    changes = [{"prompt": ["a ninja"] * BATCH}, {"negative_prompt": ["red"] * BATCH}, {"shift": 2.0}]
    for change in changes[: None if case.conditioned else 2]:
        assert not close(case.draw(pipe, 4, **change), images, 1e-3), change


@every_case
def test_a_saved_pipeline_comes_back_with_its_scheduler_and_the_same_bits(case, built, drawn, tmp_path):
    pipe, folder = built(case)
    expected = [drawn(case, n) for n in STEPS]
    pipe.scheduler = case.scheduler(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = case.load(tmp_path, folder)
    assert type(loaded.scheduler) is PeRFlowScheduler
    assert settings(loaded.scheduler.config) == settings(pipe.scheduler.config)
    assert loaded.scheduler.config.perflow_type == case.perflow_type
    assert loaded.scheduler.config.prediction_type == case.base_type
    for n, images in zip(STEPS, expected, strict=True):
        assert torch.equal(case.draw(loaded, n, scheduler=loaded.scheduler), images)


@pytest.mark.parametrize("case", [c for c in CASES if c.strength], ids=lambda case: case.name)
@pytest.mark.parametrize(("n", "strength"), [(1, STRENGTH), (4, 0.2), (8, 0.1)])
def test_too_little_strength_for_one_step_is_an_error(case, n, strength, built):
    with pytest.raises(ValueError, match="strength"):
        case.call(built(case)[0], n, strength=strength)


# The T2I-Adapter pipeline decodes by a method that diffusers itself calls deprecated.
@pytest.mark.filterwarnings("ignore:The decode_latents method is deprecated:FutureWarning")
@torch.no_grad()
@every_case
def test_latents_become_pictures(case, built, drawn):
    pipe, latents = built(case)[0], drawn(case, 4)
    images = torch.as_tensor(case.draw(pipe, 4, output_type="pt"))
    if images.shape[-1] == 3:  # some pipelines know no "pt" and give arrays
        images = images.movedim(-1, 1)
    frames = latents.movedim(1, 2).flatten(0, 1) if latents.ndim == 5 else latents
    decoded = pipe.vae.decode(frames / pipe.vae.config.scaling_factor).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).reshape(images.shape)
    assert close(images, expected)
