"""Random numbers as a function of (seed, purpose, step, sample of the global batch), whoever draws them.

One process with a batch of 8 and two with 4 each get the same numbers, and a resumed run needs no generator's state.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *place: int) -> torch.Generator:
    """A CPU generator that is a function of its arguments alone."""
    digest = hashlib.blake2b(repr((seed, purpose, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass(frozen=True)
class Draws:
    """The numbers of one process: its contiguous slice of every global batch."""

    seed: int
    process_index: int = 0
    num_processes: int = 1

    def shared(self, purpose: str, step: int) -> float:
        """One number in 0..1 that all processes agree on."""
        return float(torch.rand((), generator=generator(self.seed, purpose, step), dtype=torch.float64))

    def uniform(self, purpose: str, step: int, count: int) -> Tensor:
        """(count,) float64 numbers in 0..1 for this process."""
        whole = torch.rand(
            count * self.num_processes, generator=generator(self.seed, purpose, step), dtype=torch.float64
        )
        return whole[self._first(count) : self._first(count) + count]

    def normal(self, purpose: str, step: int, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 of `shape` (count, ...); each sample has a generator of its own."""
        count, *rest = shape
        rows = range(self._first(count), self._first(count) + count)
        return torch.stack([torch.randn(rest, generator=generator(self.seed, purpose, step, row)) for row in rows])

    def _first(self, count: int) -> int:
        return self.process_index * count
