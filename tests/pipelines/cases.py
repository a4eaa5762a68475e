"""The table of pipelines that the common suite calls, one row each, named as in docs/pipelines.md."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import builders
import diffusers
import torch
from builders import SIDE
from calls import (
    depth,
    edited,
    frames,
    guided_by_image,
    guided_by_perturbation,
    image,
    image_and_control,
    image_and_mask,
    image_mask_and_control,
    image_prompt,
    perturbed,
    perturbed_control,
    plain,
    two_images,
    video,
    with_ip_adapter,
)
from replay import guided

from perflow_diffusers import PeRFlowScheduler

GUIDANCE = 4.5
PROMPTS = ["a small wizard", "a big red knight"]
NEGATIVES = ["blue", "a ninja"]

# The network's timesteps with four windows and n steps: a whole run, and one of strength 0.7 (int(0.7 n) steps).
WHOLE = {
    1: [1000],
    4: [1000, 750, 500, 250],
    5: [1000, 875, 750, 500, 250],
    8: [1000, 875, 750, 625, 500, 375, 250, 125],
}
PART = {1: [], 4: [500, 250], 5: [750, 500, 250], 8: [625, 500, 375, 250, 125]}
STRENGTH = 0.7
BATCH = 2


@dataclass(frozen=True)
class Case:
    """One pipeline: class, components, what it is called with besides prompts, and how it guides.

    `inputs(rows, shift)`: arguments for these rows of the batch; another `shift` gives other conditions.
    `strength`: whether it starts from an image; `keeps`: whether the left half is put back after every step;
    `absent`: components that `from_pretrained` is told not to look for; `frames_first`: noise is (B, F, C, H, W).
    """

    name: str
    pipeline: str
    components: Callable[[], dict]
    inputs: Callable[[Any, float], dict] = plain
    perflow_type: str = "ddim_eps"
    base_type: str = "epsilon"
    strength: bool = False
    keeps: bool = False
    guide: Callable = guided
    prepare: Callable | None = None
    latent_shape: tuple = (4, SIDE // 2, SIDE // 2)
    extra: dict = field(default_factory=dict)
    absent: tuple = ()
    frames_first: bool = False

    @property
    def cls(self):
        return getattr(diffusers, self.pipeline)

    @property
    def conditioned(self):
        """Whether `inputs` has something that another `shift` changes."""
        return self.inputs not in (plain, frames)

    def build(self, folder):
        """A pipeline with a stock scheduler; `folder` is for the files that some load."""
        pipe = self.cls(**{**self.components(), "scheduler": builders.stock_scheduler(self.base_type)})
        return self.finish(pipe, folder)

    def finish(self, pipe, folder):
        pipe.set_progress_bar_config(disable=True)
        if self.prepare is not None:
            self.prepare(pipe, folder)
        return pipe

    def load(self, saved, folder):
        """The pipeline that `save_pretrained` put into `saved`."""
        return self.finish(self.cls.from_pretrained(saved, **dict.fromkeys(self.absent)), folder)

    def timesteps(self, n):
        return PART[n] if self.strength else WHOLE[n]

    def scheduler(self, pipe):
        """A new PeRFlowScheduler, made as a user makes it."""
        return PeRFlowScheduler.from_config(pipe.scheduler.config, perflow_type=self.perflow_type)

    def kept(self):
        """(B or 1, 1, H, W): 1 where inpainting puts the picture back after every step."""
        keep = torch.zeros(1, 1, *self.latent_shape[1:])
        if self.keeps:
            keep[..., : keep.shape[-1] // 2] = 1
        return keep

    def call(self, pipe, n, rows=range(BATCH), shift=0.0, scheduler=None, **options):
        """The latents of a guided run of n steps."""
        pipe.scheduler = scheduler or self.scheduler(pipe)
        arguments = {
            "prompt": [PROMPTS[i] for i in rows],
            "negative_prompt": [NEGATIVES[i] for i in rows],
            "guidance_scale": GUIDANCE,
            "num_inference_steps": n,
            "generator": [torch.Generator().manual_seed(20 + i) for i in rows],
            "output_type": "latent",
            **({"strength": STRENGTH} if self.strength else {}),
            **self.inputs(rows, shift),
            **self.extra,
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* time windows: windows are merged", UserWarning)
            return pipe(**{**arguments, **options})[0]

    def draw(self, pipe, n, **options):
        """The same; where the strength leaves no step of n, a run at strength 1 stands in."""
        full = {"strength": 1.0} if self.strength and not self.timesteps(n) else {}
        return self.call(pipe, n, **full, **options)


def motion():
    components = builders.sd(builders.motion_unet(), motion_adapter=builders.motion_adapter())
    return {k: v for k, v in components.items() if "safety" not in k}


def depth_components():
    components = builders.sd(builders.unet(5), depth_estimator=None)
    return {k: v for k, v in components.items() if "safety" not in k}


def xl_adapter():
    components = builders.xl(builders.xl_unet(attention_above=True), adapter=builders.t2i_adapter())
    return {k: v for k, v in components.items() if k != "add_watermarker"}


def own(unet):
    """A network of its own where a pipeline changes it."""
    return unet.__wrapped__()


CASES = [
    Case("sd15-text-to-image", "StableDiffusionPipeline", builders.sd),
    Case("sd15-text-to-image-diff-eps", "StableDiffusionPipeline", builders.sd, perflow_type="diff_eps"),
    Case("sd15-img2img", "StableDiffusionImg2ImgPipeline", builders.sd, image, strength=True),
    Case(
        "sd15-img2img-diff-eps",
        "StableDiffusionImg2ImgPipeline",
        builders.sd,
        image,
        perflow_type="diff_eps",
        strength=True,
    ),
    Case(
        "sd15-inpaint-4-channel",
        "StableDiffusionInpaintPipeline",
        builders.sd,
        image_and_mask,
        strength=True,
        keeps=True,
    ),
    Case(
        "sd15-inpaint-9-channel",
        "StableDiffusionInpaintPipeline",
        lambda: builders.sd(builders.unet(9)),
        image_and_mask,
    ),
    Case(
        "sd15-controlnet",
        "StableDiffusionControlNetPipeline",
        lambda: builders.sd(controlnet=builders.controlnet()),
        image,
    ),
    Case(
        "sd15-two-controlnets",
        "StableDiffusionControlNetPipeline",
        lambda: builders.sd(controlnet=builders.two_controlnets()),
        two_images,
        extra={"controlnet_conditioning_scale": [1.0, 0.5]},
    ),
    Case(
        "sd15-controlnet-img2img",
        "StableDiffusionControlNetImg2ImgPipeline",
        lambda: builders.sd(controlnet=builders.controlnet()),
        image_and_control,
        strength=True,
    ),
    Case(
        "sd15-controlnet-inpaint",
        "StableDiffusionControlNetInpaintPipeline",
        lambda: builders.sd(controlnet=builders.controlnet()),
        image_mask_and_control,
        strength=True,
        keeps=True,
    ),
    Case(
        "sd15-t2i-adapter",
        "StableDiffusionAdapterPipeline",
        lambda: builders.sd(adapter=builders.t2i_adapter()),
        image,
    ),
    Case(
        "sd15-ip-adapter",
        "StableDiffusionPipeline",
        lambda: builders.sd(own(builders.unet)),
        image_prompt,
        prepare=with_ip_adapter,
    ),
    Case(
        "sd15-animatediff",
        "AnimateDiffPipeline",
        motion,
        frames,
        latent_shape=(4, 3, SIDE // 2, SIDE // 2),
    ),
    Case(
        "sd15-animatediff-video-to-video",
        "AnimateDiffVideoToVideoPipeline",
        motion,
        video,
        strength=True,
        frames_first=True,
        latent_shape=(4, 3, SIDE // 2, SIDE // 2),
    ),
    Case(
        "sd15-pag",
        "StableDiffusionPAGPipeline",
        lambda: builders.sd(pag_applied_layers=["mid"]),
        perturbed,
        guide=guided_by_perturbation,
    ),
    Case(
        "sd15-controlnet-pag",
        "StableDiffusionControlNetPAGPipeline",
        lambda: builders.sd(controlnet=builders.controlnet(), pag_applied_layers=["mid"]),
        perturbed_control,
        guide=guided_by_perturbation,
    ),
    Case(
        "sd15-instruct-pix2pix",
        "StableDiffusionInstructPix2PixPipeline",
        lambda: builders.sd(builders.unet(8)),
        edited,
        guide=guided_by_image,
    ),
    Case(
        "sd20-depth",
        "StableDiffusionDepth2ImgPipeline",
        depth_components,
        depth,
        strength=True,
        absent=("depth_estimator", "feature_extractor"),
    ),
    Case(
        "sd21-velocity",
        "StableDiffusionPipeline",
        builders.sd,
        perflow_type="velocity",
        base_type="v_prediction",
    ),
    Case("sd21-ddim-eps", "StableDiffusionPipeline", builders.sd, base_type="v_prediction"),
    Case(
        "sd21-velocity-img2img",
        "StableDiffusionImg2ImgPipeline",
        builders.sd,
        image,
        perflow_type="velocity",
        base_type="v_prediction",
        strength=True,
    ),
    Case("sdxl-text-to-image", "StableDiffusionXLPipeline", builders.xl),
    Case("sdxl-img2img", "StableDiffusionXLImg2ImgPipeline", builders.xl, image, strength=True),
    Case("sdxl-refiner-img2img", "StableDiffusionXLImg2ImgPipeline", builders.refiner, image, strength=True),
    Case(
        "sdxl-inpaint",
        "StableDiffusionXLInpaintPipeline",
        builders.xl,
        image_and_mask,
        strength=True,
        keeps=True,
    ),
    Case(
        "sdxl-controlnet",
        "StableDiffusionXLControlNetPipeline",
        lambda: builders.xl(controlnet=builders.controlnet(xl=True)),
        image,
    ),
    Case(
        "sdxl-controlnet-img2img",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        lambda: builders.xl(controlnet=builders.controlnet(xl=True)),
        image_and_control,
        strength=True,
    ),
    Case(
        "sdxl-ip-adapter",
        "StableDiffusionXLPipeline",
        lambda: builders.xl(own(builders.xl_unet), feature_extractor=None),
        image_prompt,
        prepare=with_ip_adapter,
    ),
    Case(
        "sdxl-pag",
        "StableDiffusionXLPAGPipeline",
        lambda: builders.xl(pag_applied_layers=["mid"]),
        perturbed,
        guide=guided_by_perturbation,
    ),
    Case("sdxl-t2i-adapter", "StableDiffusionXLAdapterPipeline", xl_adapter, image),
    Case(
        "sdxl-instruct-pix2pix",
        "StableDiffusionXLInstructPix2PixPipeline",
        lambda: builders.xl(builders.xl_unet(8)),
        edited,
        guide=guided_by_image,
    ),
]
