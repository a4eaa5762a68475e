"""How a student looks while it learns: pictures beside the teacher's, and how straight its windows are."""

import logging
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from perflow_diffusers import PeRFlowScheduler
from perflow_diffusers.flow import SigmaWindows, euler
from perflow_training.config import TrainingConfig
from perflow_training.stopping import Stopped, Stopping
from perflow_training.teacher.backbone import Backbone, Boundaries
from perflow_training.teacher.encode import Pipeline, decode_latents, encode_prompts, latent_size
from perflow_training.teacher.observed import Observed

logger = logging.getLogger(__name__)
SIDE = 128  # pixels at least of a picture's width
MARGIN = 16  # pixels above the columns, for their names
Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def straightness(
    predict: Predict, backbone: Backbone, windows: Boundaries, prediction_type: str, noise: Tensor, steps: int = 4
) -> list[float]:
    """(K,) how much the student's own velocity varies along each window, 0 = a straight line.

    From `noise` (B, ...) the student takes `steps` equal steps a window: the mean square of (velocity - mean
    velocity of the window) over the mean square of the mean velocity. (Liu et al., arXiv 2209.03003, section 2.2.)
    """
    z, scores = noise, []
    for start, end in pairwise(windows.boundaries):
        first, last = torch.tensor([start, end])  # whole timesteps stay whole
        length = first - last
        along = [length * j for j in range(steps + 1)]
        points = [first - (-(-part // steps) if isinstance(start, int) else part / steps) for part in along]
        velocities = []
        for now, then in pairwise(points):
            a, b = (float(c) for c in euler(backbone.path, prediction_type, first, last, now, then))
            following = a * z + b * predict(z, now.expand(len(z)))
            velocities.append((following - z) / float(then - now))
            z = following
        mean = torch.stack(velocities).mean(0)
        bent = torch.stack([(velocity - mean).pow(2).mean() for velocity in velocities]).mean()
        scores.append(float(bent / mean.pow(2).mean()))
    return scores


class Validation:
    """Draws every (steps, guidance) pair of `validation_samplings` beside the teacher, from the same noise.

    The teacher has the pair's guidance, or that of the solve, which a student of a guided solve has learned.
    `component` is what the pipeline calls its network. A call writes output_dir/validation/step-NNNNNN.png, one row a
    prompt, hands it to the trackers, and returns the straightness score of each window. It raises Stopped within a
    sampling step if `stopping` is told to end.
    """

    component = "unet"

    def __init__(
        self,
        pipe: Pipeline,
        config: TrainingConfig,
        windows: Boundaries,
        accelerator,
        stopping: Stopping | None = None,
    ):
        self.stopping = stopping or Stopping()
        self.pipe, self.config, self.windows, self.accelerator = pipe, config, windows, accelerator
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(config.seed + 1)
        self.noise = torch.randn(len(config.validation_prompts), *self._shape(), generator=generator)
        self.scheduler = self._scheduler()
        self.teacher_columns: dict[float, list[Image.Image]] = {}

    def _shape(self) -> tuple[int, ...]:
        """Of a sample's latents."""
        return (self.pipe.unet.config.in_channels, *_latent_size(self.pipe, self.config))

    def _scheduler(self) -> Any:
        """The one that students are drawn with."""
        config, windows = self.config, self.windows
        return PeRFlowScheduler.from_config(
            self.pipe.scheduler.config,
            prediction_type=config.parameterisation,
            num_time_windows=windows.num_windows,
            window_boundaries=list(windows.boundaries) if config.window_boundaries else None,
            **({"rescale_betas_zero_snr": True} if config.rescale_betas_zero_snr else {}),
        )

    @torch.no_grad()
    def __call__(self, step: int, student: Backbone) -> dict:
        config = self.config
        components = {**self.pipe.components, "scheduler": self.scheduler}
        components[self.component] = self.accelerator.unwrap_model(student.network)
        pipe = type(self.pipe)(**components, **self._flags())
        pipe.set_progress_bar_config(disable=True)
        columns: dict[str, list[Image.Image]] = {}
        for steps, scale in sorted(config.validation_samplings, key=lambda pair: pair[1]):
            self._add_teacher(columns, scale if config.mean_guidance is None else config.mean_guidance)
            columns[f"{int(steps)} @ {scale:g}"] = self._draw(pipe, int(steps), scale)
        if self.accelerator.is_main_process:
            grid = picture_grid(columns)
            folder = Path(config.output_dir) / "validation"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                grid.save(folder / f"step-{step:06d}.png")
                if step == config.max_train_steps:
                    logger.info("Teacher and student side by side: %s", folder / f"step-{step:06d}.png")
            except OSError as error:  # a full disk is no reason to end a run
                logger.warning("The validation picture of step %d could not be written (%s).", step, error)
            self._track(grid, step)
        return {"straightness": self._straightness(student)}

    def _add_teacher(self, columns: dict[str, list[Image.Image]], guidance: float) -> None:
        """The teacher at the guidance that a student's column is to be compared with; drawn once a run."""
        steps = self.config.validation_teacher_steps
        if guidance not in self.teacher_columns:
            self.teacher_columns[guidance] = self._draw(self.pipe, steps, guidance)
        columns[f"teacher {steps} @ {guidance:g}"] = self.teacher_columns[guidance]

    def _flags(self) -> dict:
        return {"requires_safety_checker": False} if "safety_checker" in self.pipe.components else {}

    def _draw(self, pipe: Pipeline, steps: int, guidance: float) -> list[Image.Image]:
        pictures = []
        for prompt, noise in zip(self.config.validation_prompts, self.noise, strict=True):
            size = {"height": noise.shape[1] * pipe.vae_scale_factor, "width": noise.shape[2] * pipe.vae_scale_factor}
            latents = noise[None].to(pipe.unet.device, pipe.unet.dtype)
            call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent", **size}
            call["callback_on_step_end"] = self._go_on
            out = pipe(prompt, latents=latents, **call)
            # the VAE stays in float32, whatever the networks compute in
            pictures += pipe.image_processor.postprocess(decode_latents(pipe, out.images), output_type="pil")
        return pictures

    def _go_on(self, pipe: Pipeline, step: int, timestep: int, tensors: dict) -> dict:
        """What diffusers calls after each sampling step."""
        told = self.stopping.agreed()
        if told:
            raise Stopped(told)
        return tensors

    def _straightness(self, student: Backbone) -> list[float]:
        device = self.accelerator.device
        cond = encode_prompts(self.pipe, self.config.validation_prompts, device=device)
        predict = student.guided(cond, cond, None)
        return straightness(predict, student, self.windows, self.config.parameterisation, self.noise.to(device))

    def _track(self, grid: Image.Image, step: int) -> None:
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                picture = np.asarray(grid)[None]
                if tracker.name == "wandb":
                    tracker.log_images({"validation": [grid]}, step=step)
                else:
                    tracker.log_images({"validation": picture}, step=step, dataformats="NHWC")


class ObservedValidation(Validation):
    """The same of a pipeline that is learnt by watching: its teacher is guided as its solves are, a student is not."""

    def __init__(
        self,
        observed: Observed,
        config: TrainingConfig,
        windows: SigmaWindows,
        accelerator,
        stopping: Stopping | None = None,
    ):
        self.observed, self.component = observed, observed.runs.component
        super().__init__(observed.runs.pipe, config, windows, accelerator, stopping)

    def _shape(self) -> tuple[int, ...]:
        return self.observed.shape

    def _scheduler(self) -> Any:
        return self.observed.scheduler(cast(SigmaWindows, self.windows))

    def _draw(self, pipe: Pipeline, steps: int, guidance: float) -> list[Image.Image]:
        """One picture a prompt, of a film the first; the pipeline's own decoder is taken."""
        runs, guided, scale = self.observed.runs, self.observed.guided, self.config.mean_guidance
        given = guided.on(scale, 1) if pipe is self.pipe else guided.one_call(scale)
        pictures = []
        for prompt, noise in zip(self.config.validation_prompts, self.noise, strict=True):
            call = {**runs.arguments, **runs.prompts([prompt]), **given, "callback_on_step_end": self._go_on}
            latents = noise[None].to(self.accelerator.device)
            out = pipe(**call, num_inference_steps=steps, latents=latents, output_type="pil")[0]
            pictures.append(out[0] if isinstance(out[0], Image.Image) else out[0][0])
        return pictures

    def _straightness(self, student: Backbone) -> list[float]:
        prompts = self.config.validation_prompts
        cond = self.observed.conditions(prompts, self.config.mean_guidance)
        predict = student.guided(cond, cond, None)
        return straightness(predict, student, self.windows, "velocity", self.noise.to(self.accelerator.device))


def picture_grid(columns: dict[str, list[Image.Image]]) -> Image.Image:
    """One picture of all: a column a name, as wide as its pictures and its name need, a row a prompt.

    Small pictures are enlarged by repeating their pixels.
    """
    pictures = next(iter(columns.values()))
    factor = max(1, SIDE // pictures[0].width)
    width, height = pictures[0].width * factor, pictures[0].height * factor
    font = ImageFont.load_default()
    widths = [max(width, math.ceil(font.getlength(name)) + 4) for name in columns]
    grid = Image.new("RGB", (sum(widths), MARGIN + height * len(pictures)), "white")
    draw, left = ImageDraw.Draw(grid), 0
    for wide, (name, column) in zip(widths, columns.items(), strict=True):
        draw.text((left + 2, 2), name, fill="black", font=font)
        for j, picture in enumerate(column):
            large = picture.resize((width, height), Image.Resampling.NEAREST) if factor > 1 else picture
            grid.paste(large, (left, MARGIN + j * height))
        left += wide
    return grid


def _latent_size(pipe: Pipeline, config: TrainingConfig) -> tuple[int, int]:
    if config.resolution:
        return (config.resolution // pipe.vae_scale_factor,) * 2
    return latent_size(pipe.unet.config)
