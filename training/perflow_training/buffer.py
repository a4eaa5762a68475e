"""Solved windows, and the bounded buffer that trains on each of them several times before it is replaced."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from perflow_diffusers.words.shown import shown
from perflow_training.rng import Draws
from perflow_training.teacher.conditions import Conditions, gathered, packed, unpacked

#: what older checkpoints call the rows of conditions
OLD_NAMES = {
    "embeds": "encoder_hidden_states",
    "pooled": "added_cond_kwargs.text_embeds",
    "time_ids": "added_cond_kwargs.time_ids",
}


@shown
@dataclass(frozen=True, eq=False)
class SolvedWindows:
    """`z_start`, `z_end` (B, ...); `start`, `end` (B,) path indices or noise levels, on the CPU; `cond` of T rows.

    T divides B: row i has the conditions i mod T, for the windows of T trajectories stand one after the other.
    `names` (T, or none) say which examples they were made of.
    """

    z_start: Tensor
    z_end: Tensor
    start: Tensor
    end: Tensor
    cond: Conditions
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: Tensor) -> "SolvedWindows":
        """The rows at an index tensor, each with conditions of its own."""
        place = index.to(self.z_start.device)
        cond = self.cond[place % len(self.cond)]
        names = tuple(self.names[i % len(self.names)] for i in index.tolist()) if self.names else ()
        return SolvedWindows(self.z_start[place], self.z_end[place], self.start[index], self.end[index], cond, names)


@dataclass(frozen=True, eq=False)
class _Bucket:
    """The solves of one kind, of picture size and conditions; `strata` (number, windows of each): rows, end to end.

    They are never joined, which would hold every window twice. `start`, `end`: of all rows; `solve`, `row`, `cond`:
    each row's solve, and its place in that and in its conditions.
    """

    solves: list[SolvedWindows]
    strata: Tensor
    start: Tensor
    end: Tensor
    solve: Tensor
    row: Tensor
    cond: Tensor

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, index: Tensor) -> SolvedWindows:
        """The windows at rows `index`."""
        device = self.solves[0].z_start.device
        solve = self.solve[index]
        order = solve.argsort(stable=True)
        counts = solve.bincount(minlength=len(self.solves)).tolist()
        rows, conditions = (part[index[order]].to(device).split(counts) for part in (self.row, self.cond))
        back = order.argsort().to(device)

        held = [one.cond.rows for one in self.solves]
        told = {name: gathered([one[name] for one in held], conditions, back) for name in held[0]}
        return SolvedWindows(
            cast(Tensor, gathered([one.z_start for one in self.solves], rows, back)),
            cast(Tensor, gathered([one.z_end for one in self.solves], rows, back)),
            self.start[index],
            self.end[index],
            Conditions(told, self.solves[0].cond.shared),
            tuple(self._name(*place) for place in zip(solve.tolist(), self.cond[index].tolist(), strict=True)),
        )

    def _name(self, solve: int, trajectory: int) -> str:
        names = self.solves[solve].names
        return names[trajectory] if names else "one that an older checkpoint does not name"


class WindowBuffer:
    """Random batches of solved windows.

    `solve(number)` gives the windows of `trajectories` trajectories, window after window (one or more a trajectory).
    Holds at least one solve and at most `size` windows (a solve is never split). After each `reuse`-th part of the
    buffer's uses a new solve replaces the oldest one, so that on average a window is drawn `reuse` times.

    The trajectories of a solve and the samples of a batch are shared out among strata; a sample draws from its own.
    The strata are those of the global batch: which processes share them changes nothing, and no window has to travel.
    """

    def __init__(
        self, solve: Callable[[int], SolvedWindows], size: int, reuse: int, draws: Draws, trajectories: int
    ) -> None:
        self.solve, self.size, self.reuse, self.draws, self.trajectories = solve, size, reuse, draws, trajectories
        self.solves: list[SolvedWindows] = []
        self.buckets: list[_Bucket] = []
        self.strata = 0  # of this process
        self.credit = 0  # windows that may still be drawn before the next solve
        self.solved = 0  # windows
        self.number = 0  # solves

    def __len__(self) -> int:
        return sum(map(len, self.solves))

    def batch(self, count: int, step: int) -> SolvedWindows:
        """`count` windows, the same ones for the same `step`."""
        strata = math.gcd(count, self.trajectories)
        while self.credit < count:
            self.add(self.solve(self.number))
        if strata != self.strata:
            self.strata = strata
            self._arrange()
        self.credit -= count
        bucket = self._bucket(step)
        stratum = torch.arange(count) * strata // count
        place = (self.draws.uniform("window", step, count) * bucket.strata.shape[1]).long()
        return bucket[bucket.strata[stratum, place]]

    def add(self, fresh: SolvedWindows) -> None:
        """Puts a solve in and the oldest ones out."""
        self.solves.append(fresh)
        while len(self.solves) > 1 and len(self) > self.size:
            self.solves.pop(0)
        self.number += 1
        self.solved += len(fresh)
        self.credit += self.reuse * len(fresh)
        if self.strata:
            self._arrange()

    def _bucket(self, step: int) -> _Bucket:
        """A batch has one kind of rows, drawn by how many windows there are of each."""
        if len(self.buckets) == 1:
            return self.buckets[0]
        rest = self.draws.shared("size", step) * len(self)
        for bucket in self.buckets:
            rest -= len(bucket)
            if rest < 0:
                return bucket
        return self.buckets[-1]

    def _arrange(self) -> None:
        kinds: dict[tuple, list[SolvedWindows]] = {}
        for solve in self.solves:
            kinds.setdefault((tuple(solve.z_start.shape[1:]), *solve.cond.kind), []).append(solve)
        self.buckets = []
        for solves in kinds.values():
            lengths = torch.tensor([len(solve) for solve in solves])
            row = torch.cat([torch.arange(len(solve)) for solve in solves])
            # rows are window after window; a trajectory's number decides its stratum
            stratum = torch.arange(len(row)) % self.trajectories * self.strata // self.trajectories
            bucket = _Bucket(
                solves,
                stratum.argsort(stable=True).reshape(self.strata, -1),
                torch.cat([solve.start for solve in solves]),
                torch.cat([solve.end for solve in solves]),
                torch.arange(len(solves)).repeat_interleave(lengths),
                row,
                row % torch.tensor([len(solve.cond) for solve in solves]).repeat_interleave(lengths),
            )
            self.buckets.append(bucket)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors, JSON) of all that the next batches depend on."""
        tensors: dict[str, Tensor] = {}
        conditions = []
        for i, solve in enumerate(self.solves):
            rows = {"z_start": solve.z_start, "z_end": solve.z_end, "start": solve.start, "end": solve.end}
            # the windows of a trajectory share its conditions: stored once
            told, said = packed(solve.cond, self.trajectories)
            conditions.append(said)
            rows |= {f"cond.{name}": part for name, part in told.items()}
            rows["names"] = _bytes_of(solve.names[: self.trajectories])
            tensors |= {f"{i}.{name}": part.contiguous() for name, part in rows.items()}
        counts = {
            "credit": self.credit, "solved": self.solved, "number": self.number, "solves": len(self.solves),
            "conditions": conditions,
        }  # fmt: skip
        return tensors, counts

    def load_state(self, tensors: dict[str, Tensor], counts: dict, device: torch.device | str) -> None:
        """The opposite of `state`."""
        self.solves = []
        for i in range(counts["solves"]):
            parts = {name.removeprefix(f"{i}."): value for name, value in tensors.items() if name.startswith(f"{i}.")}
            cond = {name[5:]: parts.pop(name).to(device) for name in list(parts) if name.startswith("cond.")}
            names = _names_of(parts["names"]) if "names" in parts else ()
            self.solves.append(
                SolvedWindows(
                    parts["z_start"].to(device), parts["z_end"].to(device), parts["start"], parts["end"],
                    _conditions(cond, counts["conditions"][i] if "conditions" in counts else None), names,
                )
            )  # fmt: skip
        self.credit, self.solved, self.number = counts["credit"], counts["solved"], counts["number"]
        if self.strata:
            self._arrange()


def _conditions(tensors: dict[str, Tensor], said: dict | None) -> Conditions:
    """What `packed` has stored; older checkpoints (no `said`) have a UNet's under names of their own."""
    return (
        Conditions({OLD_NAMES[name]: value for name, value in tensors.items()})
        if said is None
        else unpacked(tensors, said)
    )


def _bytes_of(names: tuple[str, ...]) -> Tensor:
    """Texts as a tensor of bytes (JSON), which a file of tensors can hold."""
    return torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)


def _names_of(stored: Tensor) -> tuple[str, ...]:
    return tuple(json.loads(stored.numpy().tobytes()))
