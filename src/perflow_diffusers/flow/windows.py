"""The windows of a piecewise flow and the sampling grid over them, in exact integers.

Symbols: `N` training timesteps, `K` windows with boundaries `b_0 > ... > b_K` (noisy to clean), `n` sampling steps.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import overload

import torch
from torch import Tensor

# Which end of the path gives up a boundary first when there are fewer steps than windows: "noisy" or "clean". Measured
# (benchmarks/sampling_choices.py): the flow amplifies an early error, so noisy windows keep a step of their own.
JOIN = "clean"


@dataclass(frozen=True)
class Windows:
    """K windows of time, as integer timesteps.

    Fields: `boundaries`: K + 1 falling integers >= 0, usually from N to 0; anything else raises ValueError. A timestep
    on a boundary belongs to the window that *starts* there (the cleaner one), the last boundary to the last window.
    """

    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        given = tuple(self.boundaries)
        if any(isinstance(b, bool) or b != int(b) for b in given):
            raise ValueError(
                f"`boundaries={list(given)}`; expected integer timesteps such as [1000, 750, 500, 250, 0]: multiply "
                "times in [0, 1] by the number of training timesteps."
            )
        falling = all(a > b for a, b in pairwise(given))
        if len(given) < 2 or given[-1] < 0 or not falling:
            raise ValueError(
                f"`boundaries={list(given)}`; expected at least two strictly falling integers >= 0, noisy to clean, "
                "such as [1000, 750, 500, 250, 0]."
            )
        object.__setattr__(self, "boundaries", tuple(int(b) for b in given))

    def __repr__(self) -> str:
        return f"Windows({self.num_windows}: {in_short(self.boundaries)})"

    @classmethod
    def uniform(cls, num_windows: int, noise: int = 1000, clean: int = 0) -> Windows:
        """`num_windows` >= 1 windows of equal length (rounded down to integers) from timestep `noise` to `clean`."""
        if num_windows < 1 or num_windows > noise - clean:
            raise ValueError(
                f"{num_windows} windows between the timesteps {noise} and {clean}; expected 1 to {noise - clean}."
            )
        return cls(tuple(_even(noise, clean, num_windows)))

    @property
    def num_windows(self) -> int:
        """K."""
        return len(self.boundaries) - 1

    def grid(self, n: int, join: str = JOIN) -> list[int]:
        """The n + 1 falling timesteps of an n-step run, the first `boundaries[0]`, the last `boundaries[-1]`.

        n >= K: n // K steps a window, one more in the first (noisy) n % K windows, equally spaced from the window's
        start and rounded down, so every boundary is on the grid (the published rule, without its rounding errors).
        n < K: the windows are joined into n of K // n windows each; the K % n that are left over go to the noisiest or
        cleanest ones (`join`: "noisy" or "clean"), one each, so that every step still crosses whole windows.
        Raises ValueError for n < 1 and where a window has fewer timesteps than steps.
        """
        points: list[int] = []
        for first, last, steps in shares(n, self.num_windows, join):
            start, end = self.boundaries[first], self.boundaries[last]
            if steps > start - end:
                raise ValueError(
                    f"{n} sampling steps put {steps} into the window from {start} to {end}, which has only "
                    f"{start - end} timesteps. Use fewer steps or wider windows."
                )
            points += _even(start, end, steps)[:-1]
        return [*points, self.boundaries[-1]]

    def span(self, timestep: int, timestep_next: int) -> tuple[int, int]:
        """(start, end) of the window that a step from `timestep` down to `timestep_next` follows.

        It is the union of the windows touched, which is a single one unless the step crosses a boundary.
        """
        if not self.boundaries[0] >= timestep > timestep_next >= self.boundaries[-1]:
            raise ValueError(
                f"A step from timestep {timestep} to {timestep_next}; expected a falling one between "
                f"{self.boundaries[0]} and {self.boundaries[-1]}."
            )
        rising = self.boundaries[::-1]
        return rising[bisect_left(rising, timestep)], rising[bisect_right(rising, timestep_next) - 1]

    @overload
    def of(self, timestep: int) -> tuple[int, int]: ...
    @overload
    def of(self, timestep: Tensor) -> tuple[Tensor, Tensor]: ...
    def of(self, timestep: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
        """(start, end) of the window of each timestep: two integers, or two int64 tensors of the timesteps' shape."""
        if isinstance(timestep, Tensor):
            index = self.index(timestep)
            table = torch.tensor(self.boundaries, device=timestep.device)
            return table[index], table[index + 1]
        i = int(self.index(torch.tensor(timestep)))
        return self.boundaries[i], self.boundaries[i + 1]

    def index(self, timestep: Tensor) -> Tensor:
        """The number of each timestep's window, 0 (noisy) to K - 1 (clean), int64; raises ValueError out of range."""
        rising = torch.tensor(self.boundaries[::-1], device=timestep.device)
        if bool(((timestep < rising[0]) | (timestep > rising[-1])).any()):
            raise ValueError(
                f"Timesteps from {int(timestep.min())} to {int(timestep.max())}; expected {self.boundaries[-1]} to "
                f"{self.boundaries[0]}, the range of the windows."
            )
        place = torch.searchsorted(rising, timestep.contiguous().to(torch.int64))
        return (self.num_windows - place).clamp(max=self.num_windows - 1)


def shares(n: int, num_windows: int, join: str = JOIN) -> list[tuple[int, int, int]]:
    """How n steps are shared out over K windows: (first boundary, last boundary, steps between them), noisy to clean.

    n >= K: one entry a window, with n // K steps and one more in the first n % K. n < K: one entry a step, each over
    K // n windows; `join` ("noisy" or "clean") says at which end one more goes to each of K % n. Raises ValueError for
    n < 1 and another `join`.
    """
    if n < 1:
        raise ValueError(f"{n} sampling steps; expected at least 1.")
    if join not in ("noisy", "clean"):
        raise ValueError(f"`join={join!r}`; expected 'noisy' or 'clean'.")
    size, rest = divmod(max(n, num_windows), min(n, num_windows))
    if n >= num_windows:
        return [(i, i + 1, size + (i < rest)) for i in range(num_windows)]
    sizes = [size + 1] * rest + [size] * (n - rest)
    ends = [0, *accumulate(sizes if join == "noisy" else reversed(sizes))]
    return [(first, last, 1) for first, last in pairwise(ends)]


def in_short(boundaries: Sequence[object]) -> str:
    """Boundaries for a repr, noisy to clean; of many the first and the last."""
    some = boundaries if len(boundaries) <= 12 else (*boundaries[:6], "...", *boundaries[-3:])
    return " > ".join(map(str, some))


def _even(start: int, end: int, steps: int) -> Sequence[int]:
    """steps + 1 integers from start down to end, equally spaced, rounded down."""
    return [(start * steps - (start - end) * j) // steps for j in range(steps + 1)]
