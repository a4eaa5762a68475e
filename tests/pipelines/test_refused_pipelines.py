"""Pipelines that cannot work with a PeRFlowScheduler end in an error; both are listed in docs/pipelines.md."""

from collections.abc import Callable
from dataclasses import dataclass

import builders
import diffusers
import pytest
import torch
from builders import SIDE, picture, sd, xl
from cases import GUIDANCE, WHOLE, Case
from replay import close, guided, recorded, replayed

from perflow_diffusers import PeRFlowScheduler

PROMPT = {"prompt": "a small wizard", "num_inference_steps": 4, "output_type": "latent"}


def perflow():
    return PeRFlowScheduler.from_config(builders.stock_scheduler().config, perflow_type="ddim_eps")


def built(name, components):
    pipe = getattr(diffusers, name)(**components)
    pipe.scheduler = perflow()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def only(components, *names):
    return {k: v for k, v in components.items() if k in ("vae", "text_encoder", "tokenizer", "unet", *names)}


def inverted(name, components, side):
    pipe = built(name, components)
    pipe.invert(image=picture(0).resize((side, side)), num_inversion_steps=8, skip=0.1)


def edited_by_cycle():
    pipe = built("CycleDiffusionPipeline", sd())
    pipe(**PROMPT, source_prompt="a knight", image=picture(0), strength=0.6)


def upscaled_latents():
    pipe = built("StableDiffusionLatentUpscalePipeline", {**only(sd(builders.unet(8))), "scheduler": None})
    pipe(**PROMPT, image=torch.zeros(1, 4, SIDE // 2, SIDE // 2))


@dataclass(frozen=True)
class Refused:
    """A pipeline, what it needs and a PeRFlowScheduler does not have, and the error that says it."""

    name: str
    pipeline: str
    error: type
    words: str
    call: Callable


REFUSED = [
    Refused(
        "ledits-pp",
        "LEditsPPPipelineStableDiffusion",
        NotImplementedError,
        "^$",
        lambda: inverted("LEditsPPPipelineStableDiffusion", sd(), 32),
    ),
    Refused(
        "ledits-pp-sdxl",
        "LEditsPPPipelineStableDiffusionXL",
        NotImplementedError,
        "^$",
        lambda: inverted("LEditsPPPipelineStableDiffusionXL", xl(), 32),
    ),
    Refused("cycle-diffusion", "CycleDiffusionPipeline", TypeError, "eta", edited_by_cycle),
    Refused(
        "self-attention-guidance",
        "StableDiffusionSAGPipeline",
        IndexError,
        "index 1000 is out of bounds",
        lambda: built("StableDiffusionSAGPipeline", sd())(**PROMPT),
    ),
    Refused(
        "parallel-sampling",
        "StableDiffusionParadigmsPipeline",
        AttributeError,
        "'PeRFlowScheduler' object has no attribute '_get_variance'",
        lambda: built("StableDiffusionParadigmsPipeline", sd())(**PROMPT),
    ),
    Refused(
        "latent-consistency",
        "LatentConsistencyModelPipeline",
        TypeError,
        "unexpected keyword argument 'original_inference_steps'",
        lambda: built("LatentConsistencyModelPipeline", sd())(**PROMPT),
    ),
    Refused(
        "latent-upscaler",
        "StableDiffusionLatentUpscalePipeline",
        AttributeError,
        "'PeRFlowScheduler' object has no attribute 'sigmas'",
        upscaled_latents,
    ),
]


@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused.name)
def test_a_pipeline_that_cannot_work_ends_in_an_error(refused):
    with pytest.raises(refused.error, match=refused.words):
        refused.call()


@pytest.mark.parametrize(("name", "components"), [("", sd), ("XL", xl)], ids=["sd15", "sdxl"])
def test_ledits_builds_itself_with_a_scheduler_of_its_own(name, components):
    pipe = getattr(diffusers, f"LEditsPPPipelineStableDiffusion{name}")(**{**components(), "scheduler": perflow()})
    assert type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    assert pipe.scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize("n", [4, 8])
def test_diffedit_inverts_to_the_noise_levels_of_the_run_only_with_trailing_timesteps(n):
    levels = {}
    for spacing in ("leading", "trailing"):
        inverse = diffusers.DDIMInverseScheduler.from_config(perflow().config, timestep_spacing=spacing)
        pipe = built("StableDiffusionDiffEditPipeline", sd(inverse_scheduler=inverse))
        options = {"num_inference_steps": n, "inpaint_strength": 0.8}
        states = pipe.invert(prompt="a small wizard", image=picture(0), **options).latents
        with recorded(pipe.unet) as seen:
            pipe(
                prompt="a knight",
                mask_image=torch.ones(1, SIDE // 2, SIDE // 2),
                image_latents=states,
                output_type="latent",
                **options,
            )
        kept = len(seen.timesteps)
        assert seen.timesteps == WHOLE[n][n - int(0.8 * n) :]
        # The state that a DDIM index i names lies at alphas_cumprod[i], which is PeRFlow's timestep i + 1.
        levels[spacing] = [int(i) + 1 for i in inverse.timesteps[:kept].flip(0)]
        assert torch.equal(seen.inputs[0][:1], states[0, 0][None])
    assert levels["trailing"] == WHOLE[n][n - int(0.8 * n) :]
    assert levels["leading"][0] == WHOLE[n][n - int(0.8 * n)] - 1000 // n + 2


def test_the_x4_upscaler_takes_the_steps_of_the_scheduler():
    """Nobody has trained PeRFlow weights for its network, so this says nothing about pictures."""
    unet = builders.unet.__wrapped__(7, num_class_embeds=1000)
    case = Case(
        "x4-upscaler",
        "StableDiffusionUpscalePipeline",
        lambda: only(sd(unet, vae=builders.vae(scaling_factor=0.08333))),
    )
    pipe = case.cls(
        **case.components(),
        scheduler=builders.stock_scheduler(),
        low_res_scheduler=diffusers.DDPMScheduler(),
        max_noise_level=350,
    )
    pipe.set_progress_bar_config(disable=True)
    with recorded(unet) as seen:
        images = case.call(pipe, 4, image=[picture(0), picture(1)])
    assert seen.timesteps == WHOLE[4]
    keep = torch.zeros(1, 1, 1, 1)
    assert close(images, replayed(seen, "ddim_eps", [*WHOLE[4], 0], lambda c: guided(c, GUIDANCE), 2, keep))
