"""A pipeline with its accelerator, and the same pipeline without: one picture at a time, interruptible."""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from perflow_diffusers.app.drawing import Cancelled, Drawing, decoded, hushed, run
from perflow_diffusers.app.settings import SAME, Settings, SettingsError
from perflow_diffusers.hub import load_perflow, set_perflow_scale, set_scheduler
from perflow_diffusers.hub.guidance import is_far
from perflow_diffusers.hub.recognise import settings_of
from perflow_diffusers.hub.state import loaded
from perflow_diffusers.miniature import MINIATURE_GUIDANCE, load_miniature
from perflow_diffusers.schedulers.stock import stock_scheduler
from perflow_diffusers.weights.read.live import find_unet
from perflow_diffusers.words.shown import shown

SMALL = 50_000_000  # parameters up to which a second UNet is cheaper than changing the strength for each comparison
_THREADS = torch.get_num_threads()
KEPT = 32  # comparisons that are remembered


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
        pipe.set_progress_bar_config(disable=True)
        second, former = None, None
        if accelerator:
            unet = find_unet(pipe)
            if sum(weight.numel() for weight in unet.parameters()) <= SMALL:
                second = copy.deepcopy(unet)
            with hushed():  # what it advises, the page and the commands do
                artifact = load_perflow(pipe, accelerator, **where)
            state = loaded(pipe)
            if state is not None:
                former = state.former.config
            else:  # the accelerator named is the pipeline itself
                second = None
        else:
            artifact = settings_of(pipe)
            with hushed():
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
        steps, guidance = settings.steps, settings.guidance_scale
        drawing = self._run(settings, image, cancelled, steps, guidance, keep=True)
        if is_far(guidance, self.guidance_scale):
            drawing.notes.append(f"Guidance {guidance:g} is far from {self.guidance_scale:g}, which this is made for.")
        return drawing

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
        size = (settings.width or self.size[0], settings.height or self.size[1])
        options: dict[str, Any] = {"image": image, "cancelled": cancelled, "keep": keep}
        with self._dressed(self._pipe_for(image), settings) as pipe:
            return run(pipe, settings, size, steps=steps, guidance_scale=guidance_scale, **options)

    def states(self, drawing: Drawing) -> list[Image.Image]:
        """The picture that each step foresaw, decoded: pred_original_sample of the scheduler."""
        return decoded(self.pipe, drawing.estimates) if drawing.estimates else []

    def _check(self, settings: Settings) -> None:
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None or not self.is_miniature:
            return  # a real pipeline cuts a long prompt, as its users know
        limit = tokenizer.model_max_length
        count = len(tokenizer(settings.prompt, truncation=False, verbose=False).input_ids)
        if count > limit:
            raise SettingsError(f"The prompt has {count} tokens, and the miniature reads {limit}. Shorten it.")
