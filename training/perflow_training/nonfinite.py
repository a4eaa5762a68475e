"""Steps whose loss or gradient is no number: which samples they were made of, and whether they are left out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from perflow_training.checkpoint import whole
from perflow_training.diagnostics import NotFinite, TrainingStopped, listed

logger = logging.getLogger(__name__)
KEPT = 1000  # steps
Part = tuple[tuple[str, ...], Tensor]  # names of the samples that were trained on at once, and their losses (B,)


@dataclass(frozen=True, eq=False)
class _Step:
    number: int
    norm: Tensor | float | None
    parts: list[Part]


class NonFinite:
    """Remembers the steps since the last look, and counts those that were left out.

    Names and losses are kept as they come: nothing waits for the device until a step is asked about, which is every
    step only where `limit` lets some be left out. All processes must call each of its functions alike.
    """

    def __init__(self, accelerator: Accelerator, limit: int):
        self.accelerator, self.limit = accelerator, limit
        self.skipped = 0
        self.steps: list[_Step] = []

    def add(self, number: int, norm: Tensor | float | None, parts: list[Part]) -> None:
        """A step that was taken, counted from 1."""
        self.steps.append(_Step(number, norm, parts))
        if len(self.steps) > KEPT:  # lines of the log that are far apart
            bad = self._first()
            self.steps = [] if bad is None else [bad]

    def looked(self) -> None:
        """The steps so far were numbers."""
        self.steps.clear()

    def leave_out(self, number: int, norm: Tensor | float | None, parts: list[Part]) -> bool:
        """Whether step `number` is to be left out, on all processes. Raises TrainingStopped above the limit."""
        if not self.limit:
            return False
        bad = torch.stack([~losses.isfinite().all() for _, losses in parts]).any().float()
        if self.accelerator.scaler is None and norm is not None:  # a loss that is scaled overflows now and then
            bad = bad + (~torch.as_tensor(whole(norm)).isfinite()).float().to(bad.device)
        if not self.accelerator.reduce(bad, "sum") > 0:
            return False
        self.skipped += 1
        names = self._names(_Step(number, norm, parts))
        if self.skipped > self.limit:
            raise TrainingStopped(
                f"Step {number} has a loss or gradient that is no number, and {self.limit} others were left out "
                f"before (`skip_nonfinite={self.limit}`). Its samples: {names}. Take these out of the data, lower "
                "`learning_rate`, or raise the limit."
            )
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d is left out (%d of %d): its loss or gradient is no number. Its samples: %s",
                number, self.skipped, self.limit, names,
            )  # fmt: skip
        return True

    def describe(self) -> dict[str, int]:
        """For a line of the log."""
        return {"skipped_steps": self.skipped} if self.limit else {}

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors about losses that are no numbers say also which step was the first, and of which samples it was."""
        try:
            yield
        except NotFinite as error:
            bad = self._first()
            if bad is None:
                raise
            raise NotFinite(
                f"{error} The first such step is {bad.number}, of these samples: {self._names(bad)}. A resumed run "
                "meets them again: take them out of the data, or let a few such steps be left out, e.g. "
                "`skip_nonfinite=20`."
            ) from None

    def _first(self) -> _Step | None:
        """The first step since the last look that was no number, on whichever process."""
        own = len(self.steps)
        for i in reversed(range(own)):
            values = [losses for _, losses in self.steps[i].parts]
            norm = self.steps[i].norm
            if norm is not None and self.accelerator.scaler is None:
                values.append(torch.as_tensor(whole(norm)))  # gathered by all, whatever their losses are
            if not all(bool(value.isfinite().all()) for value in values):
                own = i
        every = gather_object([own])
        return self.steps[min(every)] if min(every) < len(self.steps) else None

    def _names(self, step: _Step) -> str:
        """The samples, of all processes, whose losses are no numbers; all of the step's if only its gradient is."""
        bad: list[str] = []
        every: list[str] = []
        for names, losses in step.parts:
            finite = losses.isfinite().tolist()
            every += names
            bad += [name for name, fine in zip(names, finite, strict=False) if not fine]
        pairs = gather_object([(bad, every)])
        found = [name for pair in pairs for name in pair[0]] or [name for pair in pairs for name in pair[1]]
        return listed(found) or "not known"
