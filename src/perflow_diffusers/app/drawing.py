"""One call of a pipeline: counted, watched, interruptible, its warnings kept; and latents as pictures."""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image, ImageOps

from perflow_diffusers.app.settings import Settings, SettingsError
from perflow_diffusers.words.shown import shown

#: told (step, steps) after each step; the picture is given up if it answers True
Cancelled = Callable[[int, int], bool]


class Interrupted(Exception):
    """The picture was given up between two steps; the pipeline is as before."""


@shown
@dataclass
class Drawing:
    """A picture of its pipeline's own size, and what it cost.

    `evaluations`: pictures that went through the UNet, counted as they did (guidance doubles them). `milliseconds`: of
    the whole call, text encoder and VAE included. `estimates`: the clean latents that each step foresaw. `notes`:
    what the library warned of, and a guidance that is far from the accelerator's.
    """

    picture: Image.Image
    settings: Settings
    evaluations: int
    milliseconds: float
    estimates: list[torch.Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def run(
    pipe: Any,
    settings: Settings,
    size: tuple[int, int],
    *,
    steps: int,
    guidance_scale: float,
    image: Image.Image | None = None,
    cancelled: Cancelled | None = None,
    keep: bool = False,
) -> Drawing:
    """Call a pipeline once. `size`: width and height; `image`: what an image-to-image pipeline starts from.

    `keep`: collect what each step foresees, as a PeRFlowScheduler tells it. Raises Interrupted if `cancelled` said so
    after a step; SettingsError for an image without a strength.
    """
    call: dict[str, Any] = {
        "prompt": settings.prompt,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "generator": torch.Generator().manual_seed(settings.seed),
    }
    if settings.negative_prompt:
        call["negative_prompt"] = settings.negative_prompt
    if image is None:
        call |= dict(zip(("width", "height"), size, strict=True))
    else:
        if settings.strength is None:
            raise SettingsError("Image to image needs a strength.")
        call |= {"image": fit(image, *size), "strength": settings.strength}
    total = steps if image is None else max(int(steps * (settings.strength or 1)), 1)

    def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if cancelled is not None and cancelled(i + 1, total):
            raise Interrupted
        return tensors

    with (
        _counted(pipe.unet) as count,
        _watched(pipe.scheduler, keep) as estimates,
        hushed(),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        begin = time.perf_counter()
        try:
            result = pipe(**call, callback_on_step_end=after_step)
        except Interrupted:
            pipe.maybe_free_model_hooks()
            raise
        milliseconds = 1000 * (time.perf_counter() - begin)
    # A strength of 0 is what was asked for here.
    said = [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    notes = [text for text in said if not text.startswith("PeRFlowScheduler is drawing")]
    return Drawing(result.images[0], settings, count[0], milliseconds, estimates, notes)


def decoded(pipe: Any, estimates: list[torch.Tensor]) -> list[Image.Image]:
    """Clean latents, (1, C, h, w) each, as pictures: by the pipeline's VAE, one at a time."""
    vae = pipe.vae
    latents = torch.cat(estimates)
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        with torch.no_grad():
            mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
            latents = latents.to(vae.dtype)
            if mean is not None and std is not None:
                shape = (1, -1, 1, 1)
                latents = latents * latents.new_tensor(std).view(shape) / vae.config.scaling_factor
                latents = latents + latents.new_tensor(mean).view(shape)
            else:
                latents = latents / vae.config.scaling_factor
            # one at a time: decoding is what takes the memory
            decoded = [vae.decode(one[None], return_dict=False)[0] for one in latents]
    finally:
        if upcast:
            vae.to(torch.float16)
    pipe.maybe_free_model_hooks()
    return pipe.image_processor.postprocess(torch.cat(decoded).float(), output_type="pil")


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture at the given size."""
    return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)


@contextmanager
def _counted(unet: Any) -> Iterator[list[int]]:
    """Counts the samples that go through a UNet."""
    count = [0]

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        count[0] += sample.shape[0]

    handle = unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()


@contextmanager
def hushed() -> Iterator[None]:
    """No lines of the library's log about steps and guidance: notes say it where someone looks."""
    logger = logging.get_logger("diffusers.perflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _watched(scheduler: Any, keep: bool) -> Iterator[list[torch.Tensor]]:
    """Collects each step's pred_original_sample, which a pipeline throws away."""
    estimates: list[torch.Tensor] = []
    if not keep:
        yield estimates
        return
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its signature
    def watching(*args: Any, **kwargs: Any) -> Any:
        whole = kwargs.pop("return_dict", True)
        output = step(*args, **kwargs, return_dict=True)
        estimates.append(output.pred_original_sample)
        return output if whole else (output.prev_sample,)

    scheduler.step = watching
    try:
        yield estimates
    finally:
        del scheduler.step
