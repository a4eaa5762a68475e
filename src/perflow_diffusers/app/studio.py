"""A pipeline with its accelerator, and the same pipeline without: one picture at a time, interruptible."""

import copy
import functools
import hashlib
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from PIL import Image

from perflow_diffusers.app.settings import SAME, Settings, SettingsError
from perflow_diffusers.hub import load_perflow, set_perflow_scale
from perflow_diffusers.hub.guidance import is_far
from perflow_diffusers.hub.state import loaded
from perflow_diffusers.miniature import MINIATURE_GUIDANCE, load_miniature
from perflow_diffusers.schedulers.stock import stock_scheduler
from perflow_diffusers.weights.read.live import find_unet
from perflow_diffusers.words.shown import shown

#: told (step, steps) after each step; the picture is given up if it answers True
Cancelled = Callable[[int, int], bool]
SMALL = 50_000_000  # parameters up to which a second UNet is cheaper than changing the strength for each comparison
_THREADS = torch.get_num_threads()
KEPT = 32  # comparisons that are remembered


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


@shown
@dataclass
class Studio:
    """A text-to-image pipeline and what is drawn with it. Not for several threads at once: give it one.

    `model`, `accelerator`: the names that the user gave (accelerator "" for one inside the model's weights); `steps`,
    `guidance_scale`: what the accelerator recommends; `stock_guidance_scale`: the pipeline's own without it. `former`:
    configuration of the scheduler before PeRFlow's, None where the model cannot be had without its accelerator.
    `offload`: "model" or "sequential" if diffusers moves parts of it, to `device`.
    `second`: the UNet without the accelerator where it is small; otherwise the strength is set to 0 for a comparison.
    """

    pipe: Any
    model: str
    accelerator: str
    steps: int
    guidance_scale: float
    stock_guidance_scale: float = 7.5
    former: Any = None
    second: Any = None
    is_miniature: bool = False
    offload: str | None = None
    device: str | None = None
    _image_pipe: Any = None
    _scale: float = 1.0
    _kept: "OrderedDict[Any, Drawing]" = field(default_factory=OrderedDict)

    @classmethod
    def miniature(cls, checkpoint: str = "avatars") -> "Studio":
        """The embedded pipeline with its accelerator: 32 x 32 pictures, about 60 ms each on one core."""
        return cls.around(load_miniature(checkpoint), "miniature", checkpoint, is_miniature=True)

    @classmethod
    def around(cls, pipe: Any, accelerator: str, model: str, *, is_miniature: bool = False, **where: Any) -> "Studio":
        """A pipeline that is loaded already. `accelerator` "" for one that has PeRFlow in its weights.

        Raises what `load_perflow` and `set_scheduler` do.
        """
        from perflow_diffusers.hub import set_scheduler
        from perflow_diffusers.hub.recognise import settings_of

        pipe.set_progress_bar_config(disable=True)
        second, former = None, None
        if accelerator:
            unet = find_unet(pipe)
            if sum(weight.numel() for weight in unet.parameters()) <= SMALL:
                second = copy.deepcopy(unet)
            with _hushed():  # what it advises, the page and the commands do
                artifact = load_perflow(pipe, accelerator, **where)
            state = loaded(pipe)
            if state is not None:
                former = state.former.config
            else:  # the accelerator named is the pipeline itself
                second = None
        else:
            artifact = settings_of(pipe)
            with _hushed():
                set_scheduler(pipe)
        guidance = 1.0 if artifact.guidance_scale is None else artifact.guidance_scale
        stock = MINIATURE_GUIDANCE if is_miniature else 5.0 if "XL" in type(pipe).__name__ else 7.5
        return cls(pipe, model, accelerator, artifact.steps, guidance, stock, former, second, is_miniature)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a picture if the settings name none."""
        side = self.pipe.unet.config.sample_size
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return width * self.pipe.vae_scale_factor, height * self.pipe.vae_scale_factor

    @property
    def about(self) -> dict[str, str]:
        """What a picture's file says beside its settings."""
        return {"model": Path(self.model).name, "accelerator": Path(self.accelerator).name}

    def defaults(self) -> Settings:
        """Settings to begin with: the accelerator's own."""
        return Settings(
            "",
            steps=min(self.steps, 16),
            guidance_scale=self.guidance_scale,
            stock_steps=min(self.steps, 16),
            stock_guidance_scale=self.stock_guidance_scale,
        )

    def prepare_thread(self) -> None:
        """Called once in the thread that draws. A small network is faster, and steadier beside others, on one core."""
        small = self.second is not None and self.pipe.device.type == "cpu"
        torch.set_num_threads(1 if small else _THREADS)

    def draw(
        self, settings: Settings, image: Image.Image | None = None, cancelled: Cancelled | None = None
    ) -> Drawing:
        """The accelerated picture; from `image`, resized to the picture's size, if given.

        Raises Interrupted if `cancelled` said so after a step; SettingsError for a prompt that is too long.
        """
        self._check(settings)
        if self.former is not None and settings.accelerator_scale != self._scale:
            self._rescale(settings.accelerator_scale)
            self._scale = settings.accelerator_scale
        return self._run(settings, image, cancelled, settings.steps, settings.guidance_scale, keep=True)

    def draw_stock(
        self, settings: Settings, image: Image.Image | None = None, cancelled: Cancelled | None = None
    ) -> Drawing | None:
        """The same prompt and noise without the accelerator, by a stock solver; None where that cannot be had."""
        if self.former is None:
            return None
        self._check(settings)
        names = ("prompt", "negative_prompt", "seed", "stock", "stock_steps", "stock_guidance_scale", "strength")
        pixels = hashlib.sha256(image.tobytes()).digest() if image is not None else None
        key = (*(getattr(settings, name) for name in (*names, "width", "height")), pixels)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        with self._without():
            drawing = self._run(settings, image, cancelled, settings.stock_steps, settings.stock_guidance_scale)
        self._kept[key] = drawing
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return drawing

    @contextmanager
    def _without(self) -> Iterator[None]:
        unet = self.pipe.unet
        if self.second is None and self._scale != 0:
            self._rescale(0)
        self._stock = True
        try:
            yield
        finally:
            self._stock = False
            if self.second is None and self._scale != 0:
                self._rescale(self._scale)
            if self.pipe.unet is not unet:
                raise RuntimeError("The comparison left another UNet in the pipeline. Load the model again.")

    _stock = False

    def _rescale(self, scale: float) -> None:
        """Set the strength; weights that are offloaded one by one come home for it."""
        if self.offload != "sequential":
            set_perflow_scale(self.pipe, scale)
            return
        self.pipe.remove_all_hooks()
        try:
            set_perflow_scale(self.pipe, scale)
        finally:
            self.pipe.enable_sequential_cpu_offload(device=self.device)

    def _pipe_for(self, image: Image.Image | None) -> Any:
        if image is None:
            return self.pipe
        if self._image_pipe is None:
            from diffusers import AutoPipelineForImage2Image

            self._image_pipe = AutoPipelineForImage2Image.from_pipe(self.pipe)
            self._image_pipe.set_progress_bar_config(disable=True)
        return self._image_pipe

    @contextmanager
    def _dressed(self, pipe: Any, settings: Settings) -> Iterator[Any]:
        """The pipeline with the scheduler and UNet of this picture, and back."""
        scheduler, unet = pipe.scheduler, pipe.unet
        try:
            if self._stock:
                if settings.stock != SAME:
                    pipe.scheduler = stock_scheduler(settings.stock, self.former)
                pipe.unet = self.second if self.second is not None else unet
            yield pipe
        finally:
            pipe.scheduler, pipe.unet = scheduler, unet

    def _run(
        self,
        settings: Settings,
        image: Image.Image | None,
        cancelled: Cancelled | None,
        steps: int,
        guidance_scale: float,
        keep: bool = False,
    ) -> Drawing:
        width, height = (settings.width or self.size[0], settings.height or self.size[1])
        call: dict[str, Any] = {
            "prompt": settings.prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "generator": torch.Generator().manual_seed(settings.seed),
        }
        if settings.negative_prompt:
            call["negative_prompt"] = settings.negative_prompt
        if image is None:
            call |= {"width": width, "height": height}
        else:
            if settings.strength is None:
                raise SettingsError("Image to image needs a strength.")
            call |= {"image": fit(image, width, height), "strength": settings.strength}
        total = steps if image is None else max(int(steps * (settings.strength or 1)), 1)

        def after_step(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if cancelled is not None and cancelled(i + 1, total):
                raise Interrupted
            return tensors

        with (
            self._dressed(self._pipe_for(image), settings) as pipe,
            _counted(pipe.unet) as count,
            _watched(pipe.scheduler, keep) as estimates,
            _hushed(),
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
        if keep and is_far(guidance_scale, self.guidance_scale):
            notes.append(f"Guidance {guidance_scale:g} is far from {self.guidance_scale:g}, which this is made for.")
        return Drawing(result.images[0], settings, count[0], milliseconds, estimates, notes)

    def states(self, drawing: Drawing) -> list[Image.Image]:
        """The picture that each step foresaw, decoded: pred_original_sample of the scheduler."""
        if not drawing.estimates:
            return []
        vae = self.pipe.vae
        latents = torch.cat(drawing.estimates)
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
        self.pipe.maybe_free_model_hooks()
        return self.pipe.image_processor.postprocess(torch.cat(decoded).float(), output_type="pil")

    def _check(self, settings: Settings) -> None:
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None or not self.is_miniature:
            return  # a real pipeline cuts a long prompt, as its users know
        limit = tokenizer.model_max_length
        count = len(tokenizer(settings.prompt, truncation=False, verbose=False).input_ids)
        if count > limit:
            raise SettingsError(f"The prompt has {count} tokens, and the miniature reads {limit}. Shorten it.")


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture at the given size."""
    from PIL import ImageOps

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
def _hushed() -> Iterator[None]:
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
