"""Windows of a flow-matching base, in the noise level that its network is told.

Symbols: `sigma` in 0..1, `z = (1 - sigma) * x0 + sigma * eps`; `K` windows with boundaries `b_0 > ... > b_K`, noisy to
clean; `s` the shift of time, `sigma = s u / (1 + (s - 1) u)` of an even time u (Esser et al. 2024, eq. 23).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .windows import JOIN, in_short, shares


def shifted(u: float, shift: float) -> float:
    """The noise level at even time `u` in 0..1, for a `shift` > 0; 1 leaves time as it is."""
    return shift * u / (1 + (shift - 1) * u)


def unshifted(sigma: float, shift: float) -> float:
    """The even time of a noise level `sigma` in 0..1: what `shifted` takes back."""
    return sigma / (shift - (shift - 1) * sigma)


@dataclass(frozen=True)
class SigmaWindows:
    """K windows of noise levels.

    Fields: `boundaries`: K + 1 falling numbers in 0..1, usually from 1 to 0. `shift` > 0: that of the time in which
    the teacher's steps are even, and so are the steps inside a window. Anything else raises ValueError.
    """

    boundaries: tuple[float, ...]
    shift: float = 1.0

    def __post_init__(self) -> None:
        given = list(self.boundaries)
        numbers = all(isinstance(b, int | float) and not isinstance(b, bool) for b in given)
        falling = numbers and all(a > b for a, b in pairwise(given))
        if len(given) < 2 or not falling or not 0 <= given[-1] < given[0] <= 1:
            raise ValueError(
                f"`boundaries={given}`; expected at least two strictly falling noise levels in 0..1, noisy to clean, "
                "such as [1.0, 0.9, 0.75, 0.5, 0.0]: divide timesteps by the number of training timesteps."
            )
        shift = self.shift
        if not isinstance(shift, int | float) or isinstance(shift, bool) or not (shift > 0 and math.isfinite(shift)):
            raise ValueError(f"`shift={shift!r}`; expected a number above 0, such as 3.0; 1.0 leaves time as it is.")
        object.__setattr__(self, "boundaries", tuple(float(b) for b in given))
        object.__setattr__(self, "shift", float(shift))

    def __repr__(self) -> str:
        given = [f"{b:.4g}" for b in self.boundaries]
        return f"SigmaWindows({self.num_windows}: {in_short(given)}, shift {self.shift:g})"

    @classmethod
    def uniform(cls, num_windows: int, shift: float = 1.0) -> SigmaWindows:
        """`num_windows` >= 1 windows from 1 to 0 that are equally long in the even time of `shift`."""
        if not isinstance(num_windows, int) or isinstance(num_windows, bool) or num_windows < 1:
            raise ValueError(f"`num_windows={num_windows!r}`; expected an integer >= 1.")
        SigmaWindows((1.0, 0.0), shift)
        return cls(tuple(shifted(1 - i / num_windows, shift) for i in range(num_windows + 1)), shift)

    @classmethod
    def of(cls, boundaries: Sequence[float] | None, num_windows: int, shift: float) -> SigmaWindows:
        """The windows of these `boundaries`; None: `num_windows` that are equally long in the even time of `shift`."""
        return cls.uniform(num_windows, shift) if boundaries is None else cls(tuple(boundaries), shift)

    @property
    def num_windows(self) -> int:
        """K."""
        return len(self.boundaries) - 1

    def shifted(self, u: float) -> float:
        """The noise level at the even time `u` in 0..1 of the windows' shift."""
        return shifted(u, self.shift)

    def index(self, sigma: Tensor) -> Tensor:
        """The number of the window of each `sigma`, 0 (noisy) to K - 1 (clean), int64; a boundary's starts there."""
        starts = torch.tensor(self.boundaries[:-1], dtype=torch.float64, device=sigma.device)
        return (sigma.double()[..., None] <= starts + 1e-9).sum(-1) - 1

    def grid(self, n: int, join: str = JOIN) -> list[float]:
        """The n + 1 falling noise levels of an n-step run, the first `boundaries[0]`, the last `boundaries[-1]`.

        n >= K: as many steps a window as `Windows.grid` has, even in the time of `shift`, every boundary on the grid.
        n < K: windows are joined, at the end that `join` ("noisy" or "clean") says. Raises ValueError for n < 1.
        """
        points: list[float] = []
        for first, last, steps in shares(n, self.num_windows, join):
            start, end = (unshifted(self.boundaries[i], self.shift) for i in (first, last))
            between = (self.shifted(start + (end - start) * j / steps) for j in range(1, steps))
            points += [self.boundaries[first], *between]
        return [*points, self.boundaries[-1]]

    def reshifted(self, shift: float) -> SigmaWindows:
        """The same windows of even time under another `shift`, as another resolution has it."""
        times = (unshifted(b, self.shift) for b in self.boundaries)
        return SigmaWindows(tuple(shifted(u, shift) for u in times), shift)

    def chosen(self, sigmas: Sequence[float]) -> list[float]:
        """The noise levels of a run that someone chose, with the last boundary, where it ends.

        `sigmas`: strictly falling, at most the first boundary (to 1e-6) and above the last; else ValueError.
        """
        given = [float(sigma) for sigma in sigmas]
        first, last = self.boundaries[0], self.boundaries[-1]
        if not given or not all(a > b for a, b in pairwise([first + 1e-6, *given, last])):
            raise ValueError(
                f"Noise levels {[round(sigma, 6) for sigma in given]}; expected strictly falling ones, at most "
                f"{first:g} and above {last:g}, where the run ends by itself: leave the end out."
            )
        return [*given, last]
