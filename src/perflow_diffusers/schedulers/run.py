"""One run of the scheduler: its timesteps and numbers, how far it is, and whose it is."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

Numbers = tuple[float, float, float, float]
Spans = dict[int, tuple[int, int]]

_ANOTHER = (
    "{}, and the scheduler follows that one now. It serves one run at a time: give each its own, with shared weights: "
    '`type(pipe)(**{{**pipe.components, "scheduler": PeRFlowScheduler.from_config(pipe.scheduler.config)}})`, and '
    "between threads a copy of each tokenizer, too."
)


@dataclass
class Run:
    """What `set_timesteps` chose, and how far it is: all of it changes at once, whichever thread looks.

    `timesteps` is kept even if someone assigns others: its address must stay taken. `former` is the run before it, and
    `replaced` names the threads whose runs were cut short.
    """

    points: tuple[int, ...]
    timesteps: Tensor
    spans: Spans
    steps: list[Numbers]
    table: Tensor | None
    exact: Tensor | None
    index: int | None = None
    begin: int | None = None
    former: Run | None = None
    owner: int = 0
    replaced: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.owner = threading.get_ident()
        self.positions = {t: i for i, t in enumerate(self.points[:-1])}
        self.unversioned = self.timesteps.is_inference()

    def __repr__(self) -> str:
        return f"Run(timesteps {list(self.points[:-1])[:8]}, {len(self.steps)} steps, index {self.index})"

    def follow(self, former: Run) -> None:
        """Take the place of another run."""
        cut = former.steps and former.owner != self.owner and (former.index or 0) < len(former.steps)
        self.replaced = (former.replaced | ({former.owner} if cut else set())) - {self.owner}
        former.former = None  # two are enough
        self.former = former

    def own(self) -> Run:
        """Itself, unless it has replaced an unfinished run of this thread."""
        if self.replaced and threading.get_ident() in self.replaced:
            raise ValueError(_ANOTHER.format("Another thread called `set_timesteps` during this run"))
        return self

    def place(self, timestep: Tensor) -> int | None:
        """Where a tensor is among the run's unchanged timesteps, by its address alone; None if it is not."""
        own = self.timesteps
        if timestep.dtype is not torch.int64 or not (self.unversioned or own._version == 0):
            return None
        first = own.data_ptr()
        if not first:  # nothing has an address on the device "meta"
            return int(timestep.storage_offset()) if timestep.device == own.device else None
        offset = timestep.data_ptr() - first
        return offset >> 3 if 0 <= offset < 8 * len(self.steps) else None

    def position(self, timestep: int | float | Tensor) -> int:
        """The same for numbers and copies: by value where it costs no wait for a device, else by counting."""
        if isinstance(timestep, Tensor):
            if timestep.__class__ is Tensor and self.former is not None:
                index = self.former.place(timestep)
                if index is not None and self.former.points == self.points:
                    return index
                if index is not None:
                    raise ValueError(_ANOTHER.format("This timestep is from before the last `set_timesteps`"))
            first = self.index is None and self.begin is None
            if not first and (timestep.device.type != "cpu" or timestep.is_floating_point()):
                return cast(int, self.begin if self.index is None else self.index)
            timestep = timestep.item()
        if timestep not in self.positions:
            todo = f"Expected one of {list(self.positions)}" if self.positions else "Call `set_timesteps` first"
            raise ValueError(f"`timestep={timestep}` is not a step of this run. {todo}.")
        return self.positions[int(timestep)]
