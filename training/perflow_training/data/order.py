"""The order in which examples are met: anew in each epoch, a function of (seed, position) alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from perflow_diffusers.words.shown import shown
from perflow_training.data.report import FailureLimit
from perflow_training.data.sources.record import Record, ShardedSource
from perflow_training.errors import DataError

#: Where in the order a record was met, sortable by time: numbers only, the epoch first.
Ref = tuple[int, ...]


class Numbered(Protocol):
    """Records of any kind by number: of a source, or rows of a cache."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@shown
@dataclass(frozen=True)
class Drawn:
    """A record of a source (or a row of a cache), and where in the order it was met."""

    ref: Ref
    record: Any


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` things in an epoch: (count,) integers, each of 0..count-1 once."""
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


class IndexedOrder:
    """All records of an epoch in a random order; position is (epoch, place)."""

    def __init__(self, source: Numbered, seed: int):
        self.source = source
        self.seed = seed
        self.epoch = 0
        self._place = 0
        self._permutation = permutation(seed, 0, len(source))

    @property
    def identity(self) -> dict:
        return {"examples": len(self.source)}

    def draw(self, limit: FailureLimit) -> Drawn:
        if self._place == len(self._permutation):
            limit.end()
            self.load((self.epoch + 1, 0))
        ref = (self.epoch, self._place)
        self._place += 1
        return Drawn(ref, self.source[int(self._permutation[ref[1]])])

    def state(self) -> Ref:
        return self.epoch, self._place

    def load(self, state: Ref) -> None:
        epoch, self._place = state
        if epoch != self.epoch:
            self.epoch = epoch
            self._permutation = permutation(self.seed, epoch, len(self.source))

    def recall(self, refs: Iterable[Ref]) -> list[Drawn]:
        """The same records once more."""
        permutations: dict[int, np.ndarray] = {self.epoch: self._permutation}
        drawn = []
        for epoch, place in refs:
            if epoch not in permutations:
                permutations[epoch] = permutation(self.seed, epoch, len(self.source))
            drawn.append(Drawn((epoch, place), self.source[int(permutations[epoch][place])]))
        return drawn


class ShardedOrder:
    """Shards in a random order, and blocks of consecutive records each in a random order.

    A position is (epoch, turn, start, place): the block begins `start` records into the `turn`-th shard of the epoch
    and `place` of its records are already drawn. A block is what other loaders call a shuffle buffer; being read as a
    whole it can be read again, so that a resumed run goes on exactly where it was.
    """

    def __init__(self, source: ShardedSource, seed: int, block: int):
        self.source = source
        self.seed = seed
        self.size = block
        self._begin: Ref = (0, 0, 0)
        self._next: Ref = (0, 0, 0)
        self._place = 0
        self._block: list[Record] = []
        self._reader: Iterator[Record] | None = None
        self._reader_at: Ref | None = None

    @property
    def identity(self) -> dict:
        return {"shards": self.source.num_shards, "shuffle_buffer": self.size}

    @property
    def epoch(self) -> int:
        return self._begin[0]

    def draw(self, limit: FailureLimit) -> Drawn:
        while self._place == len(self._block):
            if self._next[0] > self._begin[0]:
                limit.end()
            self._begin, self._place = self._next, 0
            self._block, self._next = self._read_block(self._begin)
            if not self._block and self._begin[1:] == (0, 0):
                raise DataError("The source of examples is empty. Look at its shards, split and column names.")
        ref = (*self._begin, self._place)
        self._place += 1
        return Drawn(ref, self._block[ref[3]])

    def state(self) -> Ref:
        return *self._begin, self._place

    def load(self, state: Ref) -> None:
        self._begin, self._place = tuple(state[:3]), state[3]
        self._block, self._next = self._read_block(self._begin) if self._place else ([], self._begin)

    def recall(self, refs: Iterable[Ref]) -> list[Drawn]:
        """The same records once more; each block that holds some of them is read again."""
        blocks: dict[Ref, list[Record]] = {self._begin: self._block}
        drawn = []
        for ref in refs:
            if ref[:3] not in blocks:
                blocks = {self._begin: self._block, ref[:3]: self._read_block(ref[:3])[0]}
            drawn.append(Drawn(ref, blocks[ref[:3]][ref[3]]))
        return drawn

    def _read_block(self, begin: Ref) -> tuple[list[Record], Ref]:
        """The shuffled block that begins there, and where the next one does."""
        epoch, turn, start = begin
        turns = permutation(self.seed, epoch, self.source.num_shards)
        if self._reader is None or self._reader_at != begin:
            self._reader = self.source.read(int(turns[turn]), start)
        block: list[Record] = []
        end: Ref = (epoch + 1, 0, 0)
        while len(block) < self.size:
            record = next(self._reader, None)
            if record is not None:
                block.append(record)
                start += 1
            elif turn + 1 < len(turns):
                turn, start = turn + 1, 0
                self._reader = self.source.read(int(turns[turn]), 0)
            else:
                self._reader = None
                break
        else:
            end = (epoch, turn, start)
        self._reader_at = end
        shuffled = np.random.default_rng([self.seed, 1, *begin]).permutation(len(block))
        return [block[index] for index in shuffled], end


Order = IndexedOrder | ShardedOrder
