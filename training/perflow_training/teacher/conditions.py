"""What a network is told about a picture beside noise and time, as rows that can be picked, joined and dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from perflow_diffusers.words.shown import shown

#: (original size, top left of the crop, target size), each (height, width) or (top, left): what SDXL is told
Sizes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
#: One a sample: a tensor (B, ...), or B tensors or plain values where samples differ in shape.
Rows = Tensor | tuple[Any, ...]
#: Stands between the name of an argument and those of the entries of a dict that is passed there.
INSIDE = "."


def time_ids(sizes: Sequence[Sizes]) -> Tensor:
    """SDXL's `time_ids`, (B, 6) float32: original height and width, top, left, target height and width."""
    return torch.tensor([[*original, *corner, *target] for original, corner, target in sizes], dtype=torch.float32)


@shown
@dataclass(frozen=True, eq=False)
class Conditions:
    """Arguments of a network's call, by name: `rows`, one a sample, and `shared` by all samples.

    Entries of a dict are named `argument.entry`, as in `added_cond_kwargs.time_ids`. Rows are a tensor (B, ...), or a
    tuple of B tensors or plain values; what is shared is passed as it is.
    """

    rows: Mapping[str, Rows]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, index: Any) -> Conditions:
        """The rows at an index tensor, a mask or a slice."""
        return self._named(lambda _, part: _picked(part, index))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditions:
        """Elsewhere, and the numbers that are not whole in another `dtype`."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            return type(value)(map(moved, value)) if isinstance(value, list | tuple) else value

        return Conditions(
            {name: moved(value) for name, value in self.rows.items()},
            {name: moved(value) for name, value in self.shared.items()},
        )

    def without_prompt(self, uncond: Conditions) -> Conditions:
        """As many rows of the empty prompt `uncond` (1 row), each with what else is told of its own picture."""
        count = len(self)
        empty = {name: _repeated(value, count) for name, value in uncond.rows.items()}
        return Conditions({**self.rows, **empty}, self.shared)

    def drop(self, dropped: Tensor, uncond: Conditions) -> Conditions:
        """Rows where `dropped` (B,) bool holds lose their prompt."""
        empty = self.without_prompt(uncond).rows
        return self._named(lambda name, kept: _chosen(dropped, empty[name], kept))

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the network."""
        given: dict[str, Any] = {}
        for name, value in {**self.shared, **self.rows}.items():
            argument, *inside = name.split(INSIDE)
            place = given
            for one in inside:
                place, argument = place.setdefault(argument, {}), one
            place[argument] = list(value) if isinstance(value, tuple) and name in self.rows else value
        return given

    def tensors(self) -> dict[str, Tensor]:
        """The rows that are tensors, by name."""
        return {name: value for name, value in self.rows.items() if isinstance(value, Tensor)}

    @cached_property
    def kind(self) -> tuple:
        """What must be equal for rows to stand in one batch: shapes, and everything that is shared."""
        rows = ((name, tuple(v.shape[1:]) if isinstance(v, Tensor) else None) for name, v in self.rows.items())
        return (*rows, *((name, _identity(value)) for name, value in self.shared.items()))

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """The rows of all, one after the other; what is shared is that of the first."""
        first = parts[0]
        return first._named(lambda name, _: joined([part.rows[name] for part in parts]))

    def _named(self, change: Callable[[str, Rows], Rows]) -> Conditions:
        return Conditions({name: change(name, value) for name, value in self.rows.items()}, self.shared)


def gathered(parts: Sequence[Rows], places: Sequence[Tensor], back: Tensor) -> Rows:
    """The rows at `places` of each part, end to end, then in the order `back`."""
    if isinstance(parts[0], Tensor):
        tensors = [cast(Tensor, part) for part in parts]
        found = [part.index_select(0, at) for part, at in zip(tensors, places, strict=True) if len(at)]
        return torch.cat(found).index_select(0, back)
    rows = [part[place] for part, at in zip(parts, places, strict=True) for place in at.tolist()]
    return tuple(rows[place] for place in back.tolist())


def packed(cond: Conditions, count: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The first `count` rows for a file: (tensors by name, JSON that says what stands where)."""
    tensors: dict[str, Tensor] = {}

    def put(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.contiguous()
            return {"tensor": str(len(tensors) - 1)}
        return {"list": [put(one) for one in value]} if isinstance(value, list | tuple) else {"value": value}

    rows = {name: put(value[:count]) for name, value in cond.rows.items()}
    return tensors, {"rows": rows, "shared": {name: put(value) for name, value in cond.shared.items()}}


def unpacked(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> Conditions:
    """The opposite of `packed`."""

    def take(given: Any) -> Any:
        if "tensor" in given:
            return tensors[given["tensor"]]
        return [take(one) for one in given["list"]] if "list" in given else given["value"]

    rows = {name: take(given) for name, given in said["rows"].items()}
    rows = {name: tuple(value) if isinstance(value, list) else value for name, value in rows.items()}
    return Conditions(rows, {name: take(given) for name, given in said["shared"].items()})


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of one argument, one after the other."""
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    return tuple(row for part in parts for row in part)


def _picked(part: Rows, index: Any) -> Rows:
    if isinstance(part, Tensor):
        return part[index.to(part.device) if isinstance(index, Tensor) else index]
    if isinstance(index, slice):
        return part[index]
    places = index.nonzero().flatten() if index.dtype == torch.bool else index
    return tuple(part[place] for place in places.tolist())


def _repeated(part: Rows, count: int) -> Rows:
    return part.expand(count, *part.shape[1:]) if isinstance(part, Tensor) else part * count


def _chosen(mask: Tensor, there: Rows, here: Rows) -> Rows:
    if isinstance(here, Tensor) and isinstance(there, Tensor):
        return torch.where(mask.to(here.device).reshape(-1, *[1] * (here.ndim - 1)), there, here)
    return tuple(a if chosen else b for chosen, a, b in zip(mask.tolist(), there, here, strict=True))


def _identity(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), hash(value.detach().cpu().double().numpy().tobytes())
    if isinstance(value, Mapping):
        return tuple((name, _identity(one)) for name, one in value.items())
    return tuple(map(_identity, value)) if isinstance(value, list | tuple) else value
