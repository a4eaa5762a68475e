"""Complete weights or the difference of two? Told by how large norms' gains and layers are, whatever a header says."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.families import FIRST_LAYERS
from perflow_diffusers.weights.read.source import WeightSource

# Gains begin at 1 and stay positive, but trained ones are anything from 0.05 to 5. A layer's numbers are 0.58 /
# sqrt(inputs) at first and 0.6 to 1.3 / sqrt(inputs) later, whatever the gains: of a delta of 30 %, 0.4.
_SIZE, _GAIN, _AGREEMENT = 0.47, 0.02, 0.5
_SAME_SIZE, _SMALLER = 0.6, 0.5  # beside a base: shares of its figures
_NEAR = 0.5  # relative distance of gains; even a delta of 30 % of the base's gains is 0.7 away from them
_LAYERS, _ROWS = 12, 8


@dataclass(frozen=True)
class Figures:
    """Of norms: their mean `gain`, and how far gains agree in sign (0..1); of layers: `size` = rms x sqrt(inputs)."""

    gain: float
    agreement: float
    size: float | None


def figures(weights: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> Figures | None:
    """Medians over the norms and some of the layers of `{canonical name: tensor}`; None if it has no norms."""
    gains, agreements = [], []
    for name in _norms(shapes):
        values = weights[name].detach().float()
        mean, rms = values.mean().item(), values.square().mean().sqrt().item()
        gains.append(mean)
        agreements.append(abs(mean) / rms if rms else 0.0)
    if not gains:
        return None
    sizes = [
        (weights[name].detach()[:_ROWS].float().square().mean() * torch.Size(shapes[name][1:]).numel()).sqrt().item()
        for name in _some_layers(shapes)
    ]
    size = statistics.median(sizes) if sizes else None
    return Figures(statistics.median(gains), statistics.median(agreements), size)


def check_difference(source: WeightSource, names: Mapping[str, str]) -> None:
    """Raise `DeltaError` if what should be a delta (`names`: canonical -> key) is a complete model by its numbers."""
    found = figures(_Named(source, names), {name: source.shapes[key] for name, key in names.items()})
    if found is not None and _is_complete(found):
        raise DeltaError(
            f"{source.name} holds complete weights, not a delta: its norms' gains are about {found.gain:.2g}, and its "
            "layers as large as a model's. Make the delta with `compute_delta(base, tuned)`."
        )


def check_complete(
    first: WeightSource, names: Mapping[str, str], second: WeightSource, others: Mapping[str, str]
) -> None:
    """Raise `DeltaError` if one of two models is a difference, going by its size beside the other."""
    pair = [
        (source, figures(_Named(source, keys), {name: source.shapes[key] for name, key in keys.items()}))
        for source, keys in ((first, names), (second, others))
    ]
    for (source, small), (other, large) in (pair, pair[::-1]):
        if small is None or large is None or small.size is None or large.size is None or not _is_complete(large):
            continue
        if abs(small.gain) < _SMALLER * large.gain and small.size < _SMALLER * large.size:
            raise DeltaError(
                f"{source.name} is a difference, not complete weights: beside those of {other.name} its norms' gains "
                f"are {small.gain:.2g} for {large.gain:.2g}. Pass the base and the tuned model themselves; "
                "`merge_delta` and `perflow merge` add a delta to a model."
            )


def is_complete_beside(source: WeightSource, names: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether what should be added to `weights` is itself a complete model: as large as they are, or near them.

    Of a LoRA only what goes with it unreduced (norms) tells. Tensors of other shapes than the base's do not count.
    """
    shared = {
        name: source.shapes[key]
        for name, key in names.items()
        if name in weights and tuple(weights[name].shape) == source.shapes[key] and name not in FIRST_LAYERS
    }
    norms = _norms(shared)
    whole = not source.partial and 4 * len(shared) > len(weights)  # a few layers alone are no model
    compared = norms or (_some_layers(shared) if whole else [])
    given = _Named(source, names)
    near = bool(compared) and _distance(given, weights, compared) < _NEAR
    if source.partial or not norms:
        return near
    found, base = figures(given, shared), figures(weights, shared)
    if found is None or base is None or found.size is None or base.size is None:
        return near
    large = found.size > _SAME_SIZE * base.size and base.size > 0
    alike = found.gain > _SAME_SIZE * abs(base.gain) and found.agreement > _AGREEMENT
    return large and (near or alike)


def _is_complete(found: Figures) -> bool:
    return found.size is not None and found.size > _SIZE and found.gain > _GAIN and found.agreement > _AGREEMENT


def _distance(given: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], names: list[str]) -> float:
    apart = total = 0.0
    for name in names:
        base = weights[name].detach()[:_ROWS] if weights[name].dim() > 1 else weights[name].detach()
        base = base.to("cpu", torch.float32)
        apart += (given[name].detach()[: len(base)].to("cpu", torch.float32) - base).square().sum().item()
        total += base.square().sum().item()
    return (apart / total) ** 0.5 if total else float("inf")


def _norms(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The gains of norms: all vectors that are no biases."""
    return [name for name, shape in shapes.items() if len(shape) == 1 and name.endswith(".weight")]


def _some_layers(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    large = sorted(
        name for name, shape in shapes.items() if len(shape) > 1 and 0 not in shape and name not in FIRST_LAYERS
    )
    return large[:: max(1, len(large) // _LAYERS)]


class _Named(Mapping[str, torch.Tensor]):
    """A source by canonical names."""

    def __init__(self, source: WeightSource, names: Mapping[str, str]) -> None:
        self.source, self.names = source, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
