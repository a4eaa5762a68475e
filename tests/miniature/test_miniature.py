"""The embedded pipeline: genuine parts, honest splits, and an accelerator that does what the README says."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTokenizer

from perflow_diffusers import (
    MINIATURE_GUIDANCE,
    PeRFlowScheduler,
    load_miniature,
    load_perflow,
    merge_delta,
    miniature_prompts,
    unload_perflow,
    unmerge_delta,
)
from perflow_diffusers.hub import perflow_scheduler
from perflow_diffusers.miniature import MINIATURE_FLOW_GUIDANCE, miniature_folder
from perflow_diffusers.schedulers.stock import STOCK, stock_scheduler

DATA = Path(__file__).parents[2] / "training" / "miniature" / "data"


@pytest.fixture(scope="module")
def pipe():
    pipe = load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(count):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def draw(pipe, prompts, steps, guidance):
    with torch.no_grad():
        pictures = pipe(
            prompts, latents=noise(len(prompts)), num_inference_steps=steps, guidance_scale=guidance, output_type="pt"
        ).images
    return pictures * 2 - 1


def test_it_is_a_stable_diffusion_pipeline_of_the_promised_size(pipe):
    assert type(pipe) is StableDiffusionPipeline
    assert isinstance(pipe.unet, UNet2DConditionModel) and isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.text_encoder, CLIPTextModel) and isinstance(pipe.tokenizer, CLIPTokenizer)
    assert pipe.scheduler.config.prediction_type == "epsilon"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=2e-5, atol=0)
    total = sum(path.stat().st_size for path in miniature_folder().rglob("*") if path.is_file())
    flow = sum(path.stat().st_size for path in miniature_folder().glob("flow*/**/*") if path.is_file())
    assert total - flow <= 15e6 and total <= 25e6  # the second base is beside it


def test_the_second_base_s_accelerator_is_nearer_in_four_calls_than_stock_samplers_in_eight():
    """To the base's own guided pictures of 40 steps; more prompts and samplers: benchmarks/flow_quality.py."""
    pipe = load_miniature("flow")
    pipe.set_progress_bar_config(disable=True)
    prompts = miniature_prompts(6, seed=11)
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def drawn_by(steps, guidance):
        with torch.no_grad():
            return pipe(
                prompts, latents=latents, num_inference_steps=steps, guidance_scale=guidance, output_type="pt"
            ).images

    own = drawn_by(40, MINIATURE_FLOW_GUIDANCE)
    pipe.scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    stock = (drawn_by(4, MINIATURE_FLOW_GUIDANCE) - own).pow(2).mean()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    before = {name: weight.clone() for name, weight in pipe.transformer.state_dict().items()}
    artifact = load_perflow(pipe, "miniature-flow")
    assert (artifact.steps, artifact.guidance_scale) == (4, 1.0)
    assert (drawn_by(artifact.steps, artifact.guidance_scale) - own).pow(2).mean() < 0.5 * stock
    unload_perflow(pipe)
    assert all(torch.equal(weight, before[name]) for name, weight in pipe.transformer.state_dict().items())
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler


def test_the_second_base_is_a_flow_matching_pipeline_that_draws_what_was_asked_for():
    """Attributes stated in held-out captions, found by the classifier; more prompts: benchmarks/flow_quality.py."""
    from attributes import load_classifier
    from pictures import load_pictures

    pipe = load_miniature("flow")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusion3Pipeline and type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    test = load_pictures("avatars", "test")
    prompts, count = test.captions[:24], 24
    obeyed = {}
    for guidance in (1.0, MINIATURE_FLOW_GUIDANCE):
        pictures = draw(pipe, prompts, 8, guidance)
        found = load_classifier().obeyed(pictures, test.attributes[:count], test.stated[:count])
        obeyed[guidance] = float(found.float().mean())
    assert obeyed[1.0] < obeyed[MINIATURE_FLOW_GUIDANCE] > 0.8, obeyed


def test_second_checkpoint_differs_in_its_unet_only(pipe):
    other = load_miniature("disco")
    assert all(torch.equal(a, b) for a, b in zip(pipe.vae.parameters(), other.vae.parameters(), strict=True))
    changed = [not torch.equal(a, b) for a, b in zip(pipe.unet.parameters(), other.unet.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_prompts_are_held_out_distinct_and_repeatable():
    prompts = miniature_prompts(64, seed=1)
    assert len(set(prompts)) == 64 and prompts == miniature_prompts(64, seed=1) != miniature_prompts(64, seed=2)
    assert set(prompts) <= set(pq.read_table(DATA / "avatars-test.parquet")["caption"].to_pylist())
    for n in (0, 10**6):
        with pytest.raises(ValueError, match=f"`n={n}`"):
            miniature_prompts(n)
    with pytest.raises(ValueError, match="avatars, disco"):
        load_miniature("cats")


@pytest.mark.parametrize("style", ["avatars", "disco", "thumbs"])
def test_no_held_out_picture_is_in_the_training_part(style):
    test, train = (
        {row["bytes"] for row in pq.read_table(DATA / f"{style}-{split}.parquet")["image"].to_pylist()}
        for split in ("test", "train")
    )
    assert not test & train


def test_the_vae_rebuilds_held_out_pictures(pipe):
    from pictures import load_pictures, to_unit

    pixels = to_unit(load_pictures("avatars", "test").images[:64])
    with torch.no_grad():
        rebuilt = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    assert 10 * torch.log10(4 / (rebuilt - pixels).pow(2).mean()) > 30  # dB; the README's table has the exact figure


def test_four_steps_beat_every_stock_sampler_at_twice_the_evaluations(pipe):
    """The product in one assertion, on both checkpoints; exact figures: benchmarks/miniature_quality.py."""
    for checkpoint in ("avatars", "disco"):
        pipe = load_miniature(checkpoint)
        pipe.set_progress_bar_config(disable=True)
        prompts = miniature_prompts(24, seed=7, checkpoint=checkpoint)
        config = pipe.scheduler.config
        reference = draw(pipe, prompts, 100, MINIATURE_GUIDANCE)
        stock = {}
        for name in STOCK:
            pipe.scheduler = stock_scheduler(name, config)
            stock[name] = float((draw(pipe, prompts, 4, MINIATURE_GUIDANCE) - reference).pow(2).mean())
        with merge_delta(pipe, "miniature") as merged:
            pipe.scheduler = perflow_scheduler(config, merged.metadata)
            ours = float((draw(pipe, prompts, 4, 1.0) - reference).pow(2).mean())
        assert ours < min(stock.values()), (checkpoint, ours, stock)


def test_the_lora_beside_the_delta_keeps_most_of_its_gain(pipe):
    """83 % of it on 192 prompts, over the best stock sampler at the same evaluations: benchmarks/delta_sizes.py."""
    prompts = miniature_prompts(24, seed=7)
    config = pipe.scheduler.config
    reference = draw(pipe, prompts, 50, MINIATURE_GUIDANCE)

    def error(steps, guidance):
        return float((draw(pipe, prompts, steps, guidance) - reference).pow(2).mean())

    errors = {}
    for name in STOCK:
        pipe.scheduler = stock_scheduler(name, config)
        errors[name] = error(2, MINIATURE_GUIDANCE)
    for source in ("miniature", "miniature-lora"):
        pipe.scheduler = DDIMScheduler.from_config(config)
        artifact = load_perflow(pipe, source)
        errors[source] = error(artifact.steps, artifact.guidance_scale)
        unload_perflow(pipe)
    pipe.scheduler = DDIMScheduler.from_config(config)
    stock = min(errors[name] for name in STOCK)
    assert (stock - errors["miniature-lora"]) / (stock - errors["miniature"]) > 0.7, errors


def test_merge_and_unmerge_give_back_the_same_picture(pipe):
    prompts = miniature_prompts(2, seed=3)
    before = draw(pipe, prompts, 5, MINIATURE_GUIDANCE)
    merge_delta(pipe, "miniature")
    during = draw(pipe, prompts, 5, MINIATURE_GUIDANCE)
    unmerge_delta(pipe)
    assert torch.equal(draw(pipe, prompts, 5, MINIATURE_GUIDANCE), before)
    assert not torch.equal(during, before)


def test_accelerated_pipeline_survives_save_and_load(pipe, tmp_path):
    prompts = miniature_prompts(2, seed=3)
    stock = pipe.scheduler
    with merge_delta(pipe, "miniature") as merged:
        pipe.scheduler = perflow_scheduler(stock.config, merged.metadata)
        wanted = draw(pipe, prompts, 4, 1.0)
        pipe.save_pretrained(tmp_path)
    pipe.scheduler = stock
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is PeRFlowScheduler
    assert torch.equal(draw(loaded, prompts, 4, 1.0), wanted)


def test_image_to_image_keeps_more_of_the_picture_at_lower_strength(pipe):
    from pictures import load_pictures, to_unit

    pictures = to_unit(load_pictures("avatars", "test").images[:8])
    prompts = miniature_prompts(8, seed=3)
    stock = pipe.scheduler
    with merge_delta(pipe, "miniature") as merged:
        img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        img2img.set_progress_bar_config(disable=True)
        img2img.scheduler = perflow_scheduler(stock.config, merged.metadata)
        changes = [
            float(
                (
                    img2img(
                        prompts,
                        image=(pictures + 1) / 2,
                        strength=strength,
                        num_inference_steps=4,
                        guidance_scale=1.0,
                        generator=torch.Generator().manual_seed(0),
                        output_type="pt",
                    ).images
                    * 2
                    - 1
                    - pictures
                )
                .pow(2)
                .mean()
            )
            for strength in (0.25, 0.5, 0.75, 1.0)
        ]
    assert changes == sorted(changes)
    assert changes[0] < 0.3 * changes[-1]


def test_captions_state_what_they_say_and_nothing_else():
    from captions import PERSON, caption

    assert "captions" in sys.modules
    everything = {name: words[-1] for name, words in PERSON.items()}
    assert caption(everything, []) == "a person"
    assert caption(everything, ["hat", "mood"]) == f"a {everything['mood']} person with a {everything['hat']} hat"
    assert caption(everything, list(everything)) == (
        "a sad person with long green hair, dark skin, a beard, sunglasses, a red hat and yellow clothes"
        " on a teal background"
    )
