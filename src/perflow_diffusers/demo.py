"""The demonstration: one picture that puts few steps beside many, on the embedded miniature pipeline."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from perflow_diffusers.hub import perflow_scheduler
from perflow_diffusers.miniature import (
    MINIATURE_GUIDANCE,
    load_miniature,
    miniature_prompts,
    unknown_words,
    unknown_words_sentence,
)
from perflow_diffusers.schedulers.stock import stock_scheduler
from perflow_diffusers.weights import merge_delta
from perflow_diffusers.words.shown import shown

SCALE = 4  # how many times a picture is enlarged, by repeating its pixels
LABEL = 236  # width of the column of labels
HEADER = 88  # height of a row of prompts
CHECKPOINTS = ("avatars", "disco")  # the base, and a fine-tune that the accelerator has never seen


class DemoError(ValueError):
    """A prompt that cannot be drawn or a path that cannot be written."""


@shown
@dataclass(frozen=True)
class Row:
    """One row of the picture: `pictures` (N, 3, H, W) in 0..1 of `prompts`, and what it cost.

    `milliseconds`: of one core, for one picture of the batch of N, text encoder and VAE included. `distance`: mean
    squared error, pixels in -1..1, to the checkpoint's own 100-step pictures; None for these.
    """

    label: str
    pictures: torch.Tensor
    evaluations: int
    milliseconds: float
    distance: float | None
    prompts: tuple[str, ...]


def sample(
    pipe: Any, prompts: Sequence[str], latents: torch.Tensor, steps: int, guidance_scale: float
) -> tuple[torch.Tensor, float]:
    """Pictures (N, 3, H, W) in 0..1 and the milliseconds of this process that one of them took."""
    begin = time.process_time()
    pictures = pipe(
        prompt=list(prompts),
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="pt",
    ).images
    return pictures, 1000 * (time.process_time() - begin) / len(prompts)


def check_prompts(pipe: Any, prompts: Sequence[str]) -> None:
    """Raises DemoError for a prompt that is empty or longer than the text encoder reads."""
    limit = pipe.tokenizer.model_max_length
    for prompt in prompts:
        if not prompt.strip():
            raise DemoError('A prompt is empty. Describe a person: "a person with red hair and glasses".')
        count = len(pipe.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        if count > limit:
            raise DemoError(
                f"A prompt of {len(prompt)} characters has {count} tokens, and the miniature reads {limit}: "
                f'"{prompt[:40]}...". Shorten it to one plain sentence.'
            )


def check_output(path: Path) -> None:
    """Raises DemoError unless a PNG can be written to `path`."""
    folder = path.parent
    if path.suffix.lower() != ".png":
        raise DemoError(f"The output {path} is not a .png file. Choose a name that ends in .png.")
    if path.is_dir():
        raise DemoError(f"The output {path} is a folder. Choose a file name in it.")
    if not folder.is_dir():
        raise DemoError(f"The folder {folder} does not exist. Create it, or choose another output with --out.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise DemoError(f"{path} cannot be written. Choose another output with --out.")


def draw_rows(
    prompts: Sequence[str] | None, columns: int, seed: int, on_row: Callable[[Row], None] | None = None
) -> list[Row]:
    """All rows of the demonstration, from the same noise down each column.

    `prompts` are drawn in every row; without any, each checkpoint draws `columns` of its own. Works on one core: the
    network is so small that others would only wait for each other, on a busy machine for minutes.

    Raises DemoError for prompts that cannot be drawn.
    """
    rows: list[Row] = []
    with _one_core():
        for checkpoint in CHECKPOINTS:
            pipe = load_miniature(checkpoint)
            texts = tuple(prompts) if prompts else tuple(miniature_prompts(columns, seed, checkpoint))
            check_prompts(pipe, texts)
            latents = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
            _checkpoint_rows(pipe, checkpoint, texts, latents, rows, on_row)
    return rows


def remarks(prompts: Sequence[str]) -> list[str]:
    """Sentences that name the words which a checkpoint never saw; it draws on as if they were not there."""
    said = []
    for prompt in prompts:
        base, tuned = (set(unknown_words(prompt, checkpoint)) for checkpoint in CHECKPOINTS)
        said += [unknown_words_sentence(prompt, CHECKPOINTS[0])] if base else []
        said += [unknown_words_sentence(prompt, CHECKPOINTS[1])] if tuned - base else []
    return list(dict.fromkeys(said))


@contextmanager
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _checkpoint_rows(
    pipe: Any,
    checkpoint: str,
    prompts: tuple[str, ...],
    latents: torch.Tensor,
    rows: list[Row],
    on_row: Callable[[Row], None] | None,
) -> None:
    reference: list[torch.Tensor] = []
    name = "base" if checkpoint == "avatars" else "fine-tuned"

    def add(label: str, steps: int, guidance_scale: float) -> None:
        pipe.set_progress_bar_config(desc=f"{name}, {label}", leave=False, disable=None)  # none into pipes and logs
        pictures, milliseconds = sample(pipe, prompts, latents, steps, guidance_scale)
        distance = float(((pictures - reference[0]) * 2).pow(2).mean()) if reference else None
        reference.append(pictures)
        evaluations = steps * (2 if guidance_scale > 1 else 1)
        rows.append(Row(f"{name}: {label}", pictures, evaluations, milliseconds, distance, prompts))
        if on_row is not None:
            on_row(rows[-1])

    config = pipe.scheduler.config
    add("100 steps", 100, MINIATURE_GUIDANCE)
    for stock in ("DDIM", "DPM-Solver++", "UniPC") if checkpoint == "avatars" else ("DPM-Solver++",):
        pipe.scheduler = stock_scheduler(stock, config)
        add(f"{stock}, 4 steps", 4, MINIATURE_GUIDANCE)
    with merge_delta(pipe, "miniature") as merged:
        pipe.scheduler = perflow_scheduler(config, merged.metadata)
        for steps in (4, 8) if checkpoint == "avatars" else (4,):
            add(f"PeRFlow, {steps} steps", steps, 1.0)


def compose(rows: Sequence[Row]) -> Image.Image:
    """One labelled picture of all rows; pictures are enlarged without blur."""
    count, height = len(rows[0].pictures), rows[0].pictures.shape[-1] * SCALE
    groups = [i for i, row in enumerate(rows) if i == 0 or row.prompts != rows[i - 1].prompts]
    canvas = Image.new("RGB", (LABEL + count * (height + 4), len(rows) * (height + 4) + len(groups) * HEADER), "white")
    pen = ImageDraw.Draw(canvas)
    bold, small = ImageFont.load_default(17), ImageFont.load_default(13)
    y = 0
    for i, row in enumerate(rows):
        if i in groups:
            for column, prompt in enumerate(row.prompts):
                lines = _wrap(pen, prompt, small, height, most=5)
                pen.multiline_text((LABEL + column * (height + 4), y + HEADER - 4), lines, "black", small, anchor="ld")
            y += HEADER
        name, _, what = row.label.partition(": ")
        facts = f"{row.evaluations} evaluations"
        facts += f"\nerror {row.distance:.3f}" if row.distance is not None else "\nthe reference"
        pen.text((8, y + 22), what, "black", bold)
        pen.multiline_text((8, y + 48), f"{name} checkpoint\n{facts}", "gray", small)
        for column, picture in enumerate(row.pictures):
            pixels = (picture * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
            enlarged = Image.fromarray(pixels).resize((height, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (LABEL + column * (height + 4), y))
        y += height + 4
    return canvas


def _wrap(pen: ImageDraw.ImageDraw, text: str, font: Any, width: int, most: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = [line for line in lines if line][:most]
    return "\n".join(kept) + (" ..." if len(lines) > most else "")


def table(rows: Sequence[Row]) -> str:
    """Evaluations, time and error of every row as text of at most 80 columns, and what the columns measure."""
    lines = [f"{'':34}{'evaluations':>12}{'ms a picture':>14}{'error':>9}"]
    for row in rows:
        error = "" if row.distance is None else f"{row.distance:.4f}"
        lines.append(f"{row.label:34}{row.evaluations:>12}{row.milliseconds:>14.1f}{error:>9}")
    batch = len(rows[0].pictures)
    lines += [
        f"ms a picture: of one core, in a batch of {batch}, text encoder and VAE included.",
        "error: mean squared, pixels in -1..1, to the same checkpoint's 100 steps.",
    ]
    return "\n".join(lines)
