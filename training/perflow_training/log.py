"""What a run says of itself: sums of losses between two lines, and the lines of output_dir/log.jsonl."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checkpoint import whole

if TYPE_CHECKING:
    from .trainer import Trainer

logger = logging.getLogger(__name__)


class StepLog:
    """Losses since the last look, kept on the device: nothing waits for a number in between."""

    def __init__(self, trainer: "Trainer"):
        self.trainer, self.count = trainer, trainer.windows.num_windows
        self.steps, self.began, self.solved_before = 0, time.perf_counter(), trainer.solve_seconds
        self.sums = torch.zeros(2, self.count, device=trainer.accelerator.device)

    def add(self, index: Tensor, losses: Tensor) -> None:
        place = index.to(losses.device)
        self.sums[0].index_add_(0, place, losses.float())
        self.sums[1].index_add_(0, place, torch.ones_like(losses, dtype=torch.float32))

    def _losses(self) -> tuple[list[float | None], float]:
        """(mean loss of each window, None without samples; number of samples); all processes must call this.

        The windows' weights are taken out, so that the numbers are those of the untrained student that were printed.
        """
        loss, count = self.trainer.accelerator.reduce(self.sums, "sum").cpu()
        mean = (loss / self.trainer.weights / count.clamp(min=1)).tolist()
        return [value if n else None for value, n in zip(mean, count.tolist(), strict=True)], float(count.sum())

    def weighted(self, losses: list[float | None]) -> list[float | None]:
        """The losses as they are trained on."""
        weights = self.trainer.weights.tolist()
        return [None if x is None else x * weight for x, weight in zip(losses, weights, strict=True)]

    def check(self, norm: Tensor | float | None) -> None:
        """Raises TrainingStopped rather than let a checkpoint of broken weights replace a good one."""
        self.trainer.watch.finite(self.trainer.step, self._losses()[0], None if norm is None else float(whole(norm)))

    def take(self, norm: Tensor | float | None) -> dict:
        """The values of one log line; starts anew. The loss of a window without samples is None."""
        trainer = self.trainer
        losses, count = self._losses()
        seconds = time.perf_counter() - self.began
        values = {
            "loss": losses,
            "grad_norm": None if norm is None else float(whole(norm)),
            "learning_rate": trainer.schedule.get_last_lr()[0],
            "solve_seconds": trainer.solve_seconds,
            "solve_share": (trainer.solve_seconds - self.solved_before) / seconds,
            "solved": trainer.buffer.solved,
            "samples_per_second": count / seconds,
            **trainer.feed.describe(),
            **trainer.nonfinite.describe(),
        }
        self.sums.zero_()
        self.steps, self.began, self.solved_before = 0, time.perf_counter(), trainer.solve_seconds
        return values


def append_log(path: Path, resumed_at: int) -> Callable[[int, dict], None]:
    """Writes one JSON line a call; lines of steps that a resumed run repeats are taken out first.

    A log that a new run finds is kept under another name. A line that cannot be written (a full disk) is lost with one
    warning, and the run goes on.
    """
    if resumed_at and path.is_file():
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_at]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)
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
