"""One run of the scheduler: its timesteps and numbers, how far it is, and whose it is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from ..flow import NoisePath, Windows, clean_estimate, euler

Numbers = tuple[float, float, float, float]
Spans = dict[int, tuple[int, int]]

_ANOTHER = (
    "{}, and the scheduler follows that one now. It serves one run at a time: give each its own, with shared weights: "
    '`type(pipe)(**{{**pipe.components, "scheduler": PeRFlowScheduler.from_config(pipe.scheduler.config)}})`, and '
    "between threads a copy of each tokenizer, too."
)


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What `set_timesteps` chose: one value, which changes as a whole whichever thread looks.

    Fields: `points`, the timesteps and where the last step ends. `timesteps`, (n,) int64 or float32, what the network
    is to see; kept even if someone assigns others: its address must stay taken. `steps`, one row of numbers a step:
    (a, b) of the step, (p, q) of the x0 estimate. `exact`, the same in float64 in the form in which the scheduler
    looks rows up by timestep, NaN where no step is; `table` is it in float32, beside the timesteps. `spans`, by
    integer timestep: the window that its step follows.
    """

    points: tuple[float, ...]
    timesteps: Tensor
    steps: tuple[Numbers, ...] = ()
    exact: Tensor | None = None
    spans: Spans = field(default_factory=dict)
    table: Tensor | None = field(init=False)
    positions: dict[float, int] = field(init=False)
    unversioned: bool = field(init=False)
    item_size: int = field(init=False)

    def __post_init__(self) -> None:
        # A device need not have float64, unless it holds a sample in it.
        table = None if self.exact is None else self.exact.to(torch.float32).to(self.timesteps.device)
        derived = {
            "table": table,
            "positions": {t: i for i, t in enumerate(self.points[:-1])},
            "unversioned": self.timesteps.is_inference(),
            "item_size": self.timesteps.element_size(),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Run(timesteps {list(self.points[:-1])[:8]}, {len(self.steps)} steps)"

    def place(self, timestep: Tensor) -> int | None:
        """Where a tensor is among the run's unchanged timesteps, by its address alone; None if it is not."""
        own = self.timesteps
        if timestep.dtype is not own.dtype or not (self.unversioned or own._version == 0):
            return None
        first = own.data_ptr()
        if not first:  # nothing has an address on the device "meta"
            return int(timestep.storage_offset()) if timestep.device == own.device else None
        offset = timestep.data_ptr() - first
        return offset // self.item_size if 0 <= offset < self.item_size * len(self.steps) else None


def no_run(timesteps: Tensor) -> Run:
    """The run of a scheduler before `set_timesteps`: no step at all."""
    return Run((), timesteps)


def run_over(points: Sequence[int], timesteps: Tensor, windows: Windows, path: NoisePath, prediction_type: str) -> Run:
    """The run over falling `points`, every number of it computed in float64 once; `timesteps` are all but the last."""
    moves = list(pairwise(points))
    spans = {t: windows.span(t, t_next) for t, t_next in moves}
    home = path.alpha.device  # where the tables were made, whatever the default device is now
    t, t_next, start, end = torch.tensor([(*x, *spans[x[0]]) for x in moves], device=home).unbind(1)
    step = euler(path, prediction_type, start, end, t, t_next)
    estimate = clean_estimate(path, prediction_type, start, end, t)
    # Rows off the grid stay NaN: inside a compiled graph nothing can raise, and NaN is seen.
    exact = torch.full((len(path.alpha), 4), torch.nan, dtype=torch.float64, device=home)
    rows = torch.stack([*step, *estimate], dim=1)
    exact[t] = rows
    return Run(tuple(points), timesteps, _as_numbers(rows), exact, spans)


def straight_run(levels: Tensor, told: Tensor, timesteps: Tensor) -> Run:
    """The run of a flow-matching base over falling noise levels sigma, (n + 1,) float32 as diffusers' Euler has them.

    `told`, (n + 1,) float32: what the network is told of them, sigma itself or 1 - sigma; `timesteps`, (n,) float32:
    in its units. It gives noise minus data, or else data minus noise. A step is Euler's, `z + (told' - told) out`, and
    the clean sample `z - sigma out`, or else `z + sigma out`.
    """
    sign = 1.0 if told[0] > told[-1] else -1.0
    one = torch.ones_like(levels[1:])
    rows = torch.stack([one, told.diff(), one, -sign * levels[:-1]], dim=1).double()
    seen = timesteps.to("cpu", torch.float64)
    exact = torch.cat([torch.cat([seen[:, None], rows], dim=1), torch.full((1, 5), torch.nan, dtype=torch.float64)])
    return Run((*seen.tolist(), float(told[-1])), timesteps, _as_numbers(rows), exact)


def _as_numbers(rows: Tensor) -> tuple[Numbers, ...]:
    return tuple((a, b, p, q) for a, b, p, q in rows.tolist())


@dataclass
class Course:
    """How far a run is, and whose it is.

    `former` is the run before it, and `replaced` names the threads whose runs were cut short.
    """

    run: Run
    index: int | None = None
    begin: int | None = None
    former: Run | None = None
    owner: int = field(default_factory=threading.get_ident)
    replaced: frozenset[int] = frozenset()

    def next(self, run: Run) -> Course:
        """The course of another run in place of this one."""
        course = Course(run, former=self.run)
        cut = self.run.steps and self.owner != course.owner and (self.index or 0) < len(self.run.steps)
        course.replaced = (self.replaced | ({self.owner} if cut else set())) - {course.owner}
        return course

    def own(self) -> Course:
        """Itself, unless it has replaced an unfinished run of this thread."""
        if self.replaced and threading.get_ident() in self.replaced:
            raise ValueError(_ANOTHER.format("Another thread called `set_timesteps` during this run"))
        return self

    def position(self, timestep: int | float | Tensor) -> int:
        """The same for numbers and copies: by value where it costs no wait for a device, else by counting."""
        if isinstance(timestep, Tensor):
            if timestep.__class__ is Tensor and self.former is not None:
                index = self.former.place(timestep)
                if index is not None and self.former.points == self.run.points:
                    return index
                if index is not None:
                    raise ValueError(_ANOTHER.format("This timestep is from before the last `set_timesteps`"))
            first = self.index is None and self.begin is None
            strange = timestep.is_floating_point() != self.run.timesteps.is_floating_point()
            if not first and (timestep.device.type != "cpu" or strange):
                return cast(int, self.begin if self.index is None else self.index)
            timestep = timestep.item()
        if timestep not in self.run.positions:
            todo = (
                f"Expected one of {list(self.run.positions)}" if self.run.positions else "Call `set_timesteps` first"
            )
            raise ValueError(f"`timestep={timestep}` is not a step of this run. {todo}.")
        return self.run.positions[timestep]
