"""Whether a delta acts in a model already: merged, fused or attached, told by a sample of its base's weights."""

import json
from collections.abc import Mapping
from typing import Any

import torch

from perflow_diffusers.weights.read import live
from perflow_diffusers.weights.read.source import WeightSource

#: Of a delta: what acts at half its strength is within.
WITHIN = 0.4
_VALUES, _MAX_TEXT = 24, 1 << 20


def values(weight: torch.Tensor) -> list[float]:
    """At most 24 numbers spread over a weight."""
    index = torch.linspace(
        0, weight.numel() - 1, min(_VALUES, weight.numel()), dtype=torch.float64, device="cpu"
    ).long()
    # Not every device has float64: first home, then wide.
    return torch.take(weight.detach(), index.to(weight.device)).cpu().double().tolist()


def share_within(
    sample: Mapping[str, Any], delta: WeightSource, model: torch.nn.Module, *, attached: bool = False
) -> float | None:
    """How often a delta is in a model's weights already: about 0 or 1; None where it cannot be told.

    From the numbers that were sampled of its base: the projection of (weights - base) on the delta. A fine-tune of the
    base has little in common with the delta, and the result must be four times what chance would make of it.
    `attached`: count the LoRAs that act beside the weights, too.
    """
    weights, names = live.live_weights(model)[0], delta.canonical[0]
    beside = live.acting_differences(model, sample) if attached else {}
    pairs = []
    for name, known in sample.items():
        weight = weights.get(name)
        if weight is None or name not in names or names[name] in getattr(delta, "on_base", ()):
            continue
        if weight.is_meta or not weight.is_floating_point():
            return None
        found, change = values(weight), values(delta[names[name]])
        if not len(known) == len(found) == len(change):
            return None
        if name in beside:
            found = [have + more for have, more in zip(found, values(beside[name]), strict=True)]
        pairs += list(zip(known, found, change, strict=True))
    if not pairs:
        return None
    base, found_, change_ = torch.tensor(pairs, dtype=torch.float64, device="cpu").unbind(1)
    moved, size = found_ - base, float(change_.square().sum())
    if not size:
        return None
    share = float((moved * change_).sum()) / size
    chance = float((moved - share * change_).square().sum() / size / len(pairs)) ** 0.5
    return share if abs(share) > 4 * chance else 0.0


def base_sample(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The sample of a base's weights that a header carries; {} if it has none, or none that can be used."""
    text = metadata.get("base_sample", "")
    try:
        sample = json.loads(text) if 0 < len(text) < _MAX_TEXT else {}
    except (ValueError, RecursionError):
        return {}
    fine = isinstance(sample, dict) and all(
        isinstance(numbers, list) and all(isinstance(x, int | float) for x in numbers) for numbers in sample.values()
    )
    return sample if fine else {}
