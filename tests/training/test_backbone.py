"""Families of teachers: what the network is told must be what its own pipeline tells it."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from perflow_diffusers import PeRFlowScheduler, load_miniature
from perflow_training.config import ConfigError
from perflow_training.teacher.backbone import base_of_scheduler, teacher_of
from perflow_training.teacher.conditions import Conditions
from perflow_training.teacher.encode import decode_latents, encode_empty, encode_images, encode_prompts, picture_size

PROMPTS = ["a person with red hair", "a dog"]


def told(pipe, **call):
    """What the pipeline's own call tells its network in the first step, and the network's output."""
    seen = {}

    def hook(module, args, kwargs, output):
        if not seen:
            seen.update(kwargs, z=args[0], timestep=args[1], out=output[0])

    handle = pipe.unet.register_forward_hook(hook, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe(PROMPTS, num_inference_steps=1, output_type="latent", **call)
    handle.remove()
    return seen


def test_guided_teacher_sees_what_the_stable_diffusion_pipeline_shows_its_network():
    pipe = load_miniature()
    seen = told(pipe, guidance_scale=3.0)
    teacher, cond, uncond = teacher_of(pipe), encode_prompts(pipe, PROMPTS), encode_empty(pipe)
    both = Conditions.cat([cond.without_prompt(uncond), cond])
    torch.testing.assert_close(both.rows["encoder_hidden_states"], seen["encoder_hidden_states"], rtol=0, atol=1e-6)
    index = torch.full((2,), int(seen["timestep"]) + 1)
    with torch.no_grad():
        guided = teacher.guided(uncond, cond, 3.0)(seen["z"][:2], index)
    without, with_prompt = seen["out"].chunk(2)
    torch.testing.assert_close(guided, without + 3 * (with_prompt - without), rtol=1e-4, atol=1e-5)
    assert teacher.prediction == "epsilon"


@pytest.mark.parametrize("zeros", [True, False])
def test_guided_teacher_sees_what_the_sdxl_pipeline_shows_its_network(tiny_sdxl, zeros):
    """Pooled embeddings, sizes and crop, and zeros for the empty prompt where the pipeline is configured so."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl, force_zeros_for_empty_prompt=zeros)
    assert picture_size(pipe) == (16, 16)
    sizes = ((50, 40), (3, 5), (16, 16))
    original, corner, target = sizes
    seen = told(pipe, guidance_scale=3.0, original_size=original, crops_coords_top_left=corner, target_size=target)
    cond, uncond = encode_prompts(pipe, PROMPTS, [sizes] * 2), encode_empty(pipe)
    both = Conditions.cat([cond.without_prompt(uncond), cond])
    torch.testing.assert_close(both.rows["encoder_hidden_states"], seen["encoder_hidden_states"], rtol=0, atol=1e-6)
    torch.testing.assert_close(
        both.rows["added_cond_kwargs.text_embeds"], seen["added_cond_kwargs"]["text_embeds"], rtol=0, atol=1e-6
    )
    assert torch.equal(both.rows["added_cond_kwargs.time_ids"], seen["added_cond_kwargs"]["time_ids"])
    assert bool((uncond.rows["encoder_hidden_states"] == 0).all()) == zeros
    index = torch.full((4,), int(seen["timestep"]) + 1)
    with torch.no_grad():
        out = teacher_of(pipe)(seen["z"], index, both)
    torch.testing.assert_close(out, seen["out"], rtol=1e-4, atol=1e-5)


def test_a_refiner_is_refused(tiny_sdxl):
    """Its network is told a score instead of the last size: five numbers."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    five = 5 * pipe.unet.config.addition_time_embed_dim + pipe.text_encoder_2.config.projection_dim
    pipe.unet.register_to_config(projection_class_embeddings_input_dim=five)
    with pytest.raises(ConfigError, match="is told 5 numbers of a picture"):
        teacher_of(pipe)


def test_rows_of_conditions_can_be_picked_joined_and_dropped(tiny_sdxl):
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    sizes = [((32, 32), (0, 0), (16, 16)), ((64, 32), (0, 4), (16, 16))]
    cond, uncond = encode_prompts(pipe, PROMPTS, sizes), encode_empty(pipe)
    dropped = cond.drop(torch.tensor([False, True]), uncond)
    assert torch.equal(
        dropped.rows["encoder_hidden_states"],
        torch.cat([cond.rows["encoder_hidden_states"][:1], uncond.rows["encoder_hidden_states"]]),
    )
    assert torch.equal(
        dropped.rows["added_cond_kwargs.text_embeds"],
        torch.cat([cond.rows["added_cond_kwargs.text_embeds"][:1], uncond.rows["added_cond_kwargs.text_embeds"]]),
    )
    assert torch.equal(
        dropped.rows["added_cond_kwargs.time_ids"], cond.rows["added_cond_kwargs.time_ids"]
    )  # the picture keeps its size
    assert cond.rows["added_cond_kwargs.time_ids"][1].tolist() == [64, 32, 0, 4, 16, 16]
    again = Conditions.cat([cond[1:], cond[torch.tensor([0])]])[torch.tensor([1, 0])]
    assert all(torch.equal(part, cond.tensors()[name]) for name, part in again.tensors().items())


def test_paths_of_stock_schedulers():
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ddim = DDIMScheduler(**betas, prediction_type="v_prediction", set_alpha_to_one=False)
    base = base_of_scheduler(ddim)
    assert (base.prediction, base.index_offset) == ("v_prediction", -1)
    torch.testing.assert_close(base.path.alpha[1:] ** 2, ddim.alphas_cumprod.double(), rtol=1e-12, atol=0)
    rescaled = DDIMScheduler(**betas, rescale_betas_zero_snr=True)
    for path in (base_of_scheduler(rescaled).path, base_of_scheduler(ddim, True).path):
        assert path.zero_terminal_snr
        torch.testing.assert_close(path.alpha[1:] ** 2, rescaled.alphas_cumprod.double(), rtol=1e-5, atol=1e-9)
    assert base_of_scheduler(EulerDiscreteScheduler(**betas, rescale_betas_zero_snr=True)).path.zero_terminal_snr


@pytest.mark.parametrize(
    "options", [{}, {"set_alpha_to_one": True}, {"set_alpha_to_one": False}, {"beta_schedule": "squaredcos_cap_v2"}]
)
def test_the_student_is_trained_on_the_path_that_it_is_sampled_on(options):
    """Down to the clean end, where a scheduler's default is not the sampler's."""
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        given = {key: value for key, value in options.items() if kind is DDIMScheduler or key != "set_alpha_to_one"}
        stock = kind(**given)
        sampler = PeRFlowScheduler.from_config(stock.config, prediction_type="ddim_eps")
        assert torch.equal(base_of_scheduler(stock).path.alpha, sampler.path.alpha)
        assert torch.equal(base_of_scheduler(stock).path.sigma, sampler.path.sigma)


class OtherLevels(DDIMScheduler):
    """Changes its noise levels without a word in its config."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alphas_cumprod = self.alphas_cumprod**2


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(), "cannot be trained on. .*flow matching"),
        (lambda: UniPCMultistepScheduler(use_flow_sigmas=True), "flow matching"),
        (lambda: EulerDiscreteScheduler(timestep_type="continuous"), "continuous noise levels"),
        (lambda: EDMEulerScheduler(), "EDM"),
        (lambda: CogVideoXDDIMScheduler(), "shifted noise levels"),
        (lambda: DDPMScheduler(beta_schedule="sigmoid"), "`beta_schedule='sigmoid'`"),
        (lambda: OtherLevels(), "OtherLevels has other noise levels than its config says"),
    ],
)
def test_a_base_that_no_sampler_could_follow_is_refused_before_training(scheduler, words):
    pipe = load_miniature()
    pipe.scheduler = scheduler()
    with pytest.raises(ConfigError, match=words):
        teacher_of(pipe)


def test_latents_are_the_posterior_s_scaled_draw():
    pipe = load_miniature()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist
    wanted = (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encode_images(pipe, images, noise, batch_size=1), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        pictures = pipe.vae.decode(posterior.mean + posterior.std * noise).sample
    torch.testing.assert_close(decode_latents(pipe, wanted), pictures, rtol=1e-4, atol=1e-4)


def test_latents_with_a_mean_and_spread_by_channel():
    """As newer autoencoders have them; there and back is the same."""
    pipe = load_miniature()
    pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(images).latent_dist.mean
        pictures = pipe.vae.decode(posterior).sample
    latents = encode_images(pipe, images, torch.zeros(1, 4, 8, 8))
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(latents, (posterior - mean) / std * pipe.vae.config.scaling_factor)
    torch.testing.assert_close(decode_latents(pipe, latents), pictures, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_a_teacher_is_refused():
    pipe = load_miniature()
    with pytest.raises(ConfigError, match="An epsilon-predicting teacher"):
        teacher_of(pipe, rescale_betas_zero_snr=True)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    with pytest.raises(ConfigError, match="takes 9 channels and the latents have 4: an inpainting"):
        teacher_of(pipe)
