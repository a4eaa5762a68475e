"""LoRAs of the same layers as one: factors side by side, up = [s1 up1, s2 up2, ...], down = [down1; down2; ...]."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.io.writer import Spec
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.lora_layers import LoraLayer, adapter_metadata, lora_layers
from perflow_diffusers.weights.read.lora_names import spelled
from perflow_diffusers.weights.read.source import WeightSource
from perflow_diffusers.words.shown import shown


@dataclass(frozen=True)
class _Part:
    """One source's share of a layer: its change is `strength` times up @ down."""

    source: WeightSource
    layer: LoraLayer
    strength: float

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, ...) of the weight that it changes."""
        down, up = self.source.shapes[self.layer.down], self.source.shapes[self.layer.up]
        return (up[0], down[1], *(down if self.layer.mid is None else self.source.shapes[self.layer.mid])[2:])

    def stored(self, key: str) -> torch.dtype:
        return self.source.dtypes[key]

    def down(self) -> torch.Tensor:
        """(rank, in, ...); a middle factor (rank, rank, height, width) is multiplied into it."""
        down = self.source[self.layer.down].detach().cpu()
        if self.layer.mid is None:
            return down
        mid = self.source[self.layer.mid].detach().to("cpu", torch.float32)
        return torch.einsum("pqkl,qi->pikl", mid, down.float().flatten(1))


@shown
@dataclass(frozen=True)
class Joined:
    """LoRA layers in the layout of diffusers: `specs` of the tensors, `config` as the header has it, `ranks`."""

    parts: Mapping[tuple[str, str], Sequence[_Part]]
    specs: Mapping[str, Spec]
    config: str
    ranks: tuple[int, ...]

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor), one layer at a time. Raises `DeltaError` for numbers that are not finite."""
        for (component, module), parts in self.parts.items():
            stem = spelled(component, module)
            base = _base(parts)
            downs, ups = [], []
            (down_shape, down_dtype), (up_shape, up_dtype) = (
                self.specs[f"{stem}.lora_{role}.weight"] for role in "AB"
            )
            for part in parts:
                downs.append(part.down().to(down_dtype).reshape(part.layer.rank, *down_shape[1:]))
                up = part.source[part.layer.up].detach().cpu()
                share = part.strength / base if base else 1.0
                if share != 1:
                    exact = torch.promote_types(wider(up.dtype, up_dtype), torch.float32)
                    up = up.to(exact) * share
                ups.append(up.to(up_dtype).reshape(up_shape[0], part.layer.rank, *up_shape[2:]))
            for role, tensors, axis in (("A", downs, 0), ("B", ups, 1)):
                name = f"{stem}.lora_{role}.weight"
                tensor = tensors[0].contiguous() if len(tensors) == 1 else torch.cat(tensors, dim=axis)
                check_finite(name, tensor)
                yield name, tensor


def concatenated(sources: Sequence[WeightSource], scales: Sequence[float], dtype: torch.dtype | None) -> Joined:
    """The sum of LoRAs, each times its scale, as one LoRA; reads no factor.

    Raises `DeltaError` for layers that have other shapes in other sources.
    """
    found: dict[tuple[str, str], list[_Part]] = {}
    for source, scale in zip(sources, scales, strict=True):
        for layer in lora_layers(source):
            found.setdefault((layer.component, layer.module), []).append(_Part(source, layer, scale * layer.scale))
    parts = {place: found[place] for place in sorted(found)}
    misfits = [f"{'.'.join(place)} ({_shown(own)})" for place, own in parts.items() if not _fit(own)]
    if misfits:
        raise DeltaError(
            f"{len(misfits)} layers have other shapes in other sources: {keys.grouped(misfits)}. Combine LoRAs for "
            "one base model."
        )
    specs: dict[str, Spec] = {}
    strengths: dict[str, dict[str, tuple[int, float]]] = {}
    for (component, module), own in parts.items():
        stem, rank = spelled(component, module), sum(part.layer.rank for part in own)
        base, shape = _base(own), max((part.shape for part in own), key=len)
        down = reduce(wider, (torch.float32 if part.layer.mid else part.stored(part.layer.down) for part in own))
        up = reduce(wider, (part.stored(part.layer.up) for part in own))
        if any(base and abs(part.strength) != base for part in own):
            up = wider(up, torch.float32)
        specs[f"{stem}.lora_A.weight"] = ((rank, *shape[1:]), dtype or down)
        specs[f"{stem}.lora_B.weight"] = ((shape[0], rank, *(1 for _ in shape[2:])), dtype or up)
        strengths.setdefault(component, {})[module] = (rank, base * rank)
    config: dict[str, Any] = {}
    for component, modules in strengths.items():
        config |= adapter_metadata(modules, component)
    ranks = tuple(rank for modules in strengths.values() for rank, _ in modules.values())
    return Joined(parts, specs, json.dumps(config, indent=2, sort_keys=True), ranks)


def _base(parts: Sequence[_Part]) -> float:
    """The strength that most ranks of a layer have, up to sign: alpha / rank of the layer; 0 if none has any."""
    counts: Counter[float] = Counter()
    for part in parts:
        if part.strength:
            counts[abs(part.strength)] += part.layer.rank
    return counts.most_common(1)[0][0] if counts else 0.0


def _fit(parts: Sequence[_Part]) -> bool:
    """Whether all change the same weight; a linear layer and a 1 x 1 convolution may be one."""
    shapes = {part.shape for part in parts}
    return len({shape[:2] for shape in shapes}) == 1 and len({shape[2:] or (1, 1) for shape in shapes}) == 1


def _shown(parts: Sequence[_Part]) -> str:
    return ", ".join(str(part.shape) for part in parts)


def wider(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """The dtype that holds both; fp8, which torch promotes to nothing, counts as fp16."""
    one, other = (torch.float16 if dtype.itemsize == 1 else dtype for dtype in (first, second))
    return torch.promote_types(one, other)


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse (with `DeltaError`) a tensor to write that has NaN or Inf."""
    if tensor.numel() and not all(torch.isfinite(value) for value in torch.aminmax(tensor)):
        raise DeltaError(
            f"{name} has NaN or Inf in {tensor.dtype}: a source is damaged, or the sum overflows. Nothing was "
            "written. Use smaller scales, or dtype=torch.float32."
        )
