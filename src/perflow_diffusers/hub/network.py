"""Which network an accelerator belongs to: a UNet's signature, and a sample of its base's weights."""

from collections.abc import Mapping
from typing import Any

import torch

from perflow_diffusers.families import FIRST_LAYERS, NETWORKS, family_in_words, networks_of
from perflow_diffusers.weights import WeightSource, open_weights
from perflow_diffusers.weights.merge.within import values
from perflow_diffusers.weights.read import live
from perflow_diffusers.weights.read.keys import grouped
from perflow_diffusers.weights.read.live import find_network

#: Keys of a configuration that tell families apart; inputs may differ (inpainting), these may not.
SIGNATURE = tuple(dict.fromkeys(key for network in NETWORKS for key in network.signature))
# Of networks that no row of `NETWORKS` describes: what nearly all transformers say of themselves.
_OTHERS = ("_class_name", "num_layers", "num_attention_heads", "attention_head_dim")
_TENSORS = 12
# Distances of the sampled weights: up to the first, rounding explains them; beyond the second, nothing is shared.
_ROUNDING, _UNRELATED = 0.003, 0.9


def signature(network: Any) -> dict[str, Any]:
    """The part of a network's configuration (or of one given so) that its accelerators share, as JSON knows it."""
    config = network if isinstance(network, Mapping) else getattr(network, "config", {})
    known = {one.class_name for one in NETWORKS}
    keys = SIGNATURE if config.get("_class_name") in {None, *known} or set(SIGNATURE) & set(config) else _OTHERS
    found = {key: config[key] for key in keys if config.get(key) is not None}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def component_in(pipe: Any) -> str:
    """What a pipeline calls the network that it denoises with."""
    return next(iter(networks_of(pipe)))


def sample_base(base: Any) -> dict[str, list[float]]:
    """A few numbers of a few weights of a base, by canonical name; `base` is anything that `open_weights` takes."""
    weights = open_weights(base)
    names, _ = weights.canonical
    large = sorted(name for name, key in names.items() if len(weights.shapes[key]) > 1 and name not in FIRST_LAYERS)
    chosen = [large[round(i)] for i in torch.linspace(0, len(large) - 1, min(_TENSORS, len(large))).tolist()]
    return {name: [float(f"{x:.6g}") for x in values(weights[names[name]])] for name in chosen}


def relation(sample: Mapping[str, Any], pipe_or_unet: Any) -> str:
    """How a UNet relates to the base of which `sample` was taken: "base", "fine-tune", "unrelated" or "unknown".

    "base" allows for a cast to fp16 or bf16. Reads a few hundred numbers. "unknown" without a sample, and for weights
    that are elsewhere (offloaded, quantised).
    """
    weights = live_weights(find_network(pipe_or_unet))
    squares, total = 0.0, 0.0
    for name, numbers in sample.items():
        weight = weights.get(name)
        if weight is None or weight.is_meta or not weight.is_floating_point() or weight.numel() < len(numbers):
            return "unknown"
        known = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        scale = float(known.square().mean().sqrt()) or 1.0
        squares += float(((known.new_tensor(values(weight)) - known) / scale).square().sum())
        total += float((known / scale).square().sum())
    if not total:
        return "unknown"
    distance = (squares / total) ** 0.5
    return "base" if distance < _ROUNDING else "fine-tune" if distance < _UNRELATED else "unrelated"


def live_weights(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a UNet under canonical names, whatever state they are in."""
    return live.live_weights(unet)[0]


def live_shapes(unet: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the same."""
    return {name: tuple(weight.shape) for name, weight in live_weights(unet).items()}


def misfit(given: Mapping[str, Any], unet: torch.nn.Module) -> str | None:
    """In words, how a UNet differs from the signature `given`; None if it does not."""
    have = signature(unet)
    wrong = [
        f"{key} {given[key]} for {have[key]}" for key in given if key in have and not _same(given[key], have[key])
    ]
    return ", ".join(wrong) or None


def _same(first: Any, second: Any) -> bool:
    """Whether two settings agree; one number stands for the same number in every block."""
    pair = [list(value) if isinstance(value, list | tuple) else value for value in (first, second)]
    if isinstance(pair[0], list) == isinstance(pair[1], list):
        return pair[0] == pair[1]
    each, one = pair if isinstance(pair[0], list) else pair[::-1]
    return all(value == one for value in each)


def shape_misfit(delta: WeightSource, unet: torch.nn.Module) -> str | None:
    """In words, which tensors of a delta (of canonical names) a UNet has not or in another shape; None if it fits."""
    have = live_shapes(unet)
    unknown = [name for name in delta.shapes if name not in have]
    wrong = [
        f"{name} ({delta.shapes[name]} for {have[name]})"
        for name in delta.shapes
        if have.get(name, delta.shapes[name]) != delta.shapes[name]
    ]
    if not unknown and not wrong:
        return None
    kinds = [family_in_words(shapes) for shapes in (delta.shapes, have)]
    parts = [f"{kinds[0]} for {kinds[1]}"] if kinds[0] != kinds[1] else []
    parts += [f"unknown ({len(unknown)}): {grouped(unknown)}"] if unknown else []
    parts += [f"misshapen ({len(wrong)}): {grouped(wrong)}"] if wrong else []
    return "; ".join(parts)
