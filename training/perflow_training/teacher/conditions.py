"""What a network is told about a picture beside noise and time, as rows that can be picked, joined and dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from perflow_diffusers.words.shown import shown

#: (original size, top left of the crop, target size), each (height, width) or (top, left): what SDXL is told
Sizes = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def time_ids(sizes: Sequence[Sizes]) -> Tensor:
    """SDXL's `time_ids`, (B, 6) float32: original height and width, top, left, target height and width."""
    return torch.tensor([[*original, *corner, *target] for original, corner, target in sizes], dtype=torch.float32)


@shown
@dataclass(frozen=True, eq=False)
class Conditions:
    """`embeds` (B, L, D); SDXL also has `pooled` (B, P) and `time_ids` (B, 6): sizes and crop of the picture."""

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, index) -> Conditions:
        """The rows at an index tensor, a mask or a slice."""
        place = index.to(self.embeds.device) if isinstance(index, Tensor) else index
        return self._map(lambda part: part[place])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditions:
        return self._map(lambda part: part.to(device=device, dtype=dtype))

    def without_prompt(self, uncond: Conditions) -> Conditions:
        """As many rows of the empty prompt `uncond` (1 row), each with the sizes of its own picture."""
        count = len(self)
        pooled = None if uncond.pooled is None else uncond.pooled.expand(count, -1)
        return Conditions(uncond.embeds.expand(count, -1, -1), pooled, self.time_ids)

    def drop(self, dropped: Tensor, uncond: Conditions) -> Conditions:
        """Rows where `dropped` (B,) bool holds lose their prompt."""
        empty, kept = self.without_prompt(uncond).tensors(), self.tensors()
        mask = dropped.to(self.embeds.device)
        of_each = {name: mask.reshape(-1, *[1] * (value.ndim - 1)) for name, value in kept.items()}
        return Conditions(**{name: torch.where(of_each[name], empty[name], kept[name]) for name in kept})

    def kwargs(self) -> dict:
        """Keyword arguments of a diffusers UNet."""
        if self.pooled is None:
            return {"encoder_hidden_states": self.embeds}
        added = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return {"encoder_hidden_states": self.embeds, "added_cond_kwargs": added}

    def tensors(self) -> dict[str, Tensor]:
        """The parts that exist, by name."""
        return {part.name: value for part in fields(self) if (value := getattr(self, part.name)) is not None}

    @staticmethod
    def cat(parts: list[Conditions]) -> Conditions:
        return Conditions(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        return Conditions(**{name: change(value) for name, value in self.tensors().items()})
