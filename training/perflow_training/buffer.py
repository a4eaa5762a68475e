"""Solved windows, and the bounded buffer that trains on each of them several times before it is replaced."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class SolvedWindows:
    """`z_start`, `z_end` (B, C, H, W); `start`, `end` (B,) path indices; `cond` (B, L, D)."""

    z_start: torch.Tensor
    z_end: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    cond: torch.Tensor

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: torch.Tensor) -> "SolvedWindows":
        return SolvedWindows(*(getattr(self, part.name)[index] for part in fields(self)))

    @staticmethod
    def cat(parts: list["SolvedWindows"]) -> "SolvedWindows":
        return SolvedWindows(*(torch.cat([getattr(p, part.name) for p in parts]) for part in fields(SolvedWindows)))


class WindowBuffer:
    """Random batches of solved windows.

    Holds at least one solve and at most `size` windows (a solve is never split). After each `reuse`-th part of the
    buffer's uses a new solve replaces the oldest one, so that on average a window is drawn `reuse` times.
    """

    def __init__(self, solve: Callable[[], SolvedWindows], size: int, reuse: int, generator: torch.Generator):
        self.solve, self.size, self.reuse, self.generator = solve, size, reuse, generator
        self.solves: list[SolvedWindows] = []
        self.windows: SolvedWindows | None = None
        self.credit = 0  # windows that may still be drawn before the next solve
        self.solved = 0

    def batch(self, count: int) -> SolvedWindows:
        """`count` windows drawn at random."""
        while self.credit < count:
            self._add(self.solve())
        self.credit -= count
        return self.windows[torch.randint(len(self.windows), (count,), generator=self.generator)]

    def _add(self, fresh: SolvedWindows) -> None:
        self.solves.append(fresh)
        while len(self.solves) > 1 and sum(map(len, self.solves)) > self.size:
            self.solves.pop(0)
        self.windows = SolvedWindows.cat(self.solves)
        self.solved += len(fresh)
        self.credit += self.reuse * len(fresh)
