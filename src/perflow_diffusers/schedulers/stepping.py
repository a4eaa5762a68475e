"""What PeRFlow's schedulers share: one run at a time, its steps found without waiting for a device."""

from __future__ import annotations

import operator
import threading
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .combine import beside
from .run import Course, Numbers, Run, no_run

# Two threads' `set_timesteps` do not mix.
_ONE_AT_A_TIME = threading.Lock()


class Stepping:
    """Base of the schedulers: keeps the run that `set_timesteps` of a subclass has made, and looks its steps up."""

    # Called at the start of every run, by those who look after the weights that it is for.
    _before_run: Callable[[], None] | None = None
    timesteps: Tensor

    def _no_run(self) -> None:
        """The state before the first `set_timesteps`; `timesteps` are set."""
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._course = Course(no_run(self.timesteps))
        self._table: Tensor | None = None  # of the run, once more: a compiled step looks for nothing else
        self._warned = False

    def _begin(self, run: Run) -> None:
        """Make `run` the one that steps follow."""
        if self._before_run is not None:
            self._before_run()
        with _ONE_AT_A_TIME:
            self.num_inference_steps, self.timesteps = len(run.steps), run.timesteps
            self._course, self._table = self._course.next(run), run.table

    def _rows(self, table: Tensor, given: Tensor) -> Tensor:
        """The rows (B, 4) of a run's table at timesteps `given` (B,), NaN for what is no step; nothing waits."""
        raise NotImplementedError

    @property
    def step_index(self) -> int | None:
        """How many of `timesteps` are done; None before the first step. Not counted inside a compiled step."""
        return self._course.index

    @property
    def begin_index(self) -> int | None:
        """The place in `timesteps` of the first step of a run that starts in the middle; None until it is set."""
        return self._course.begin

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at `timesteps[begin_index]`; pipelines call it for image to image.

        Raises ValueError for a place that leaves no step: an image-to-image call with strength * steps < 1, or a
        refiner's with a `denoising_start` that no timestep lies below.
        """
        course, n = self._course.own(), len(self.timesteps)
        if not 0 <= begin_index < n:
            raise ValueError(
                f"`begin_index={begin_index}` leaves no step to take; expected 0 to {n - 1} with {n} steps. In image "
                "to image this means strength * num_inference_steps < 1: raise one of them. For a refiner it means "
                f"that no timestep of {self.timesteps.tolist()} lies below the cut: lower `denoising_start`, and the "
                "base's `denoising_end` with it, or use more steps."
            )
        course.begin = begin_index

    def _steps_of(self, n: Any, num_windows: int) -> int:
        """The number of steps that was asked for, checked; fewer than windows are warned of once."""
        try:
            if isinstance(n, bool):
                raise TypeError
            n = operator.index(n)
        except TypeError:
            raise ValueError(f"`num_inference_steps={n!r}`; expected an integer >= 1, without quotes.") from None
        if n < 1:
            raise ValueError(f"`num_inference_steps={n}`; expected an integer >= 1.")
        if n < num_windows and not self._warned:
            self._warned = True
            warnings.warn(
                f"{n} steps for weights with {num_windows} time windows: windows are merged, and quality "
                f"is lower than with {num_windows} steps or more.",
                stacklevel=3,
            )
        return n

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself, whatever the `timestep`: PeRFlow's network takes the state as it is."""
        return sample

    def _count(self, timestep: int | float | Tensor) -> Numbers:
        """The numbers of this step, found by address or value, or by counting where these are not to be had."""
        course = self._course.own()
        run = course.run
        index = run.place(timestep) if timestep.__class__ is Tensor else None
        if index is None:
            index = course.position(timestep)
        if index >= len(run.steps) or (course.index == len(run.steps) and isinstance(timestep, Tensor)):
            raise ValueError(f"All {len(run.steps)} steps are done. Call `set_timesteps` before the next run.")
        course.index = index + 1
        return run.steps[index]

    def _look_up(self, timestep: int | float | Tensor, sample: Tensor) -> list[Tensor]:
        """The numbers of this step by timestep, each a tensor () or (B, 1, ...) beside the sample."""
        table = self._table if torch.compiler.is_compiling() else self._course.own().run.table
        if table is None:
            raise ValueError("`step` was called before `set_timesteps`. Call `set_timesteps` first.")
        if sample.dtype == torch.float64:
            table = cast(Tensor, self._course.run.exact).to(sample.device)
        # One-dimensional even for a single timestep: torch.compile takes a 0-d index for a constant.
        given = (timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep, device="cpu")).reshape(-1)
        rows = self._rows(table, given)
        if not torch.compiler.is_compiling() and bool(rows.isnan().any()):
            raise ValueError(
                f"`timestep={given.tolist()}`; expected steps of this run, {list(self._course.run.points[:-1])}."
            )
        return [beside(c, sample) for c in rows.unbind(-1)]
