"""What a run says of itself: sums of losses between two lines, and the lines of output_dir/log.jsonl."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from perflow_diffusers.io.atomic import write_whole

logger = logging.getLogger(__name__)


class StepLog:
    """Losses since the last look, kept on the device: nothing waits for a number in between.

    `weights` (K,): of the windows' losses. `solve_seconds`: what solving has cost so far.
    """

    def __init__(self, accelerator: Accelerator, weights: Tensor, solve_seconds: float = 0.0):
        self.accelerator, self.weights = accelerator, weights
        self.steps, self.began, self.solved_before = 0, time.perf_counter(), solve_seconds
        self.sums = torch.zeros(2, len(weights), device=accelerator.device)

    def add(self, index: Tensor, losses: Tensor) -> None:
        place = index.to(losses.device)
        self.sums[0].index_add_(0, place, losses.float())
        self.sums[1].index_add_(0, place, torch.ones_like(losses, dtype=torch.float32))

    def losses(self) -> tuple[list[float | None], float]:
        """(mean loss of each window, None without samples; number of samples); all processes must call this.

        The windows' weights are taken out, so that the numbers are those of the untrained student that were printed.
        """
        loss, count = self.accelerator.reduce(self.sums, "sum").cpu()
        mean = (loss / self.weights / count.clamp(min=1)).tolist()
        return [value if n else None for value, n in zip(mean, count.tolist(), strict=True)], float(count.sum())

    def weighted(self, losses: list[float | None]) -> list[float | None]:
        """The losses as they are trained on."""
        weights = self.weights.tolist()
        return [None if x is None else x * weight for x, weight in zip(losses, weights, strict=True)]

    def take(self, norm: float | None, solve_seconds: float, **others: float) -> dict:
        """The values of one log line, with `others`; starts anew. The loss of a window without samples is None."""
        losses, count = self.losses()
        seconds = time.perf_counter() - self.began
        values = {
            "loss": losses,
            "grad_norm": norm,
            "solve_seconds": solve_seconds,
            "solve_share": (solve_seconds - self.solved_before) / seconds,
            "samples_per_second": count / seconds,
            **others,
        }
        self.sums.zero_()
        self.steps, self.began, self.solved_before = 0, time.perf_counter(), solve_seconds
        return values


def to_trackers(accelerator: Accelerator, step: int, values: dict, names: str) -> None:
    """Hands a line of the log to the trackers `names`, a number a window; a full disk is no reason to end a run."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/window_{i}": item for i, item in enumerate(value, 1) if item is not None}
        elif value is not None:
            flat[name] = value
    try:
        accelerator.log(flat, step=step)
    except OSError as error:
        logger.warning("`report_to=%s` could not be written to (%s).", names, error)


def append_log(path: Path, resumed_at: int) -> Callable[[int, dict], None]:
    """Writes one JSON line a call; lines of steps that a resumed run repeats are taken out first.

    A log that a new run finds is kept under another name. A line that cannot be written (a full disk) is lost with one
    warning, and the run goes on.
    """
    if resumed_at and path.is_file():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_at]
        write_whole(path, "".join(f"{line}\n" for line in kept))
    elif path.is_file() and path.stat().st_size:
        number = 1
        while (older := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        os.replace(path, older)
        logger.warning("%s is of an earlier run, which left no checkpoint: it is now %s.", path, older)
    failed = False

    def on_log(step: int, values: dict) -> None:
        nonlocal failed
        complete = path.stat().st_size if path.is_file() else 0
        try:
            with path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):  # no half line before the next one
                os.truncate(path, complete)
            if not failed:
                logger.warning("%s cannot be written (%s): lines will be missing in it.", path, error)
            failed = True

    return on_log


def _step_of(line: str) -> float:
    """The step of a log line; infinity for the half line that a kill leaves at the end."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
