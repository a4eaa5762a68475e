"""What LoRA files hold besides low-rank pairs: LoHa, LoKr, whole differences, biases, and DoRA's magnitudes.

W is a weight of the base, D the change that factors make, s = alpha / rank:
LoHa      D = s (a1 b1) * (a2 b2), element by element
LoKr      D = s (w1 kron w2), each whole or a product
DoRA      W' = m (W + D) / norm(W + D), the norm over all axes but that of m
In the Tucker form of a convolution, a and b are joined by a small core of the kernel's size. As in LyCORIS and PEFT.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families import NETWORKS
from perflow_diffusers.weights.read import keys, lora_names
from perflow_diffusers.weights.read.adapter_config import AdapterConfig, adapter_configs
from perflow_diffusers.weights.read.lora_layers import LoraLayer, named_tensors, number
from perflow_diffusers.weights.read.source import WeightSource
from perflow_diffusers.words.shown import shown

_Shape = tuple[int, ...]
_Parts = Mapping[str, str]  # role -> key in the source

# Modules that are convolutions in every UNet of these families -> the size of their kernel.
_KERNELS = {name: size for network in NETWORKS for name, size in network.kernels.items()}
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


@shown
@dataclass(frozen=True)
class KinLayer:
    """A change of one parameter that is no low-rank pair: `kind` "loha", "lokr" or "whole", tensors by role.

    `parameter` is "weight" or "bias" of `module`; the change is `scale` times what the tensors make.
    """

    component: str
    module: str
    parameter: str
    kind: str
    parts: _Parts
    scale: float


@shown
@dataclass(frozen=True)
class Kin:
    """A LoRA file taken apart: `layers`, keys of DoRA's `magnitudes` and of LoRA's `biases` by place, and the `rest`.

    A place is (component, module). `rest` holds the low-rank pairs, if there are any.
    """

    layers: tuple[KinLayer, ...]
    magnitudes: Mapping[tuple[str, str], str]
    biases: Mapping[tuple[str, str], str]
    rest: WeightSource


def split_kin(source: WeightSource, model: Mapping[str, _Shape]) -> Kin:
    """Take a LoRA file apart; `model` are the shapes of the weights at hand, {} if there are none.

    Raises `WeightSourceError` for tensors that are incomplete, do not belong together or are not floating point, and
    for a config that `adapter_configs` refuses.
    """
    configs = adapter_configs(source, lora_names.KOHYA_PREFIXES)
    places: dict[tuple[str, str], dict[str, str]] = {}
    for key, name in named_tensors(source, model).items():
        parts = places.setdefault(name.place, {})
        if name.role in lora_names.KIN_ROLES and name.role in parts:
            raise WeightSourceError(
                f"{source.name} has more than one tensor for the same change: {parts[name.role]} and {key}. Keep one "
                "adapter in a file."
            )
        parts.setdefault(name.role, key)
    layers: list[KinLayer] = []
    magnitudes, biases, taken = {}, {}, set()
    for place, parts in sorted(places.items()):
        own = _layers(source, place, parts, configs.get(place[0], AdapterConfig()))
        layers += own
        used = {role for role in parts if role in lora_names.KIN_ROLES}
        if own and "down" not in parts:
            used.add("alpha")
        taken |= {parts[role] for role in used if role in parts}
        if "dora_scale" in parts:
            magnitudes[place] = parts["dora_scale"]
        if "lora_bias" in parts:
            biases[place] = parts["lora_bias"]
        changes = [layer.kind for layer in own if layer.parameter == "weight"] + ["lora"] * ("down" in parts)
        if len(changes) > 1 or ("lora_bias" in parts and "diff_b" in parts):
            where, what = ".".join(place), ", ".join(parts)
            raise WeightSourceError(f"{source.name} has more than one change for {where}: {what}. Keep one of them.")
        lone = [parts[role] for role in ("dora_scale", "lora_bias") if role in parts and not changes]
        if lone:
            raise WeightSourceError(f"{lone[0]} of {source.name} stands without factors. Download the file again.")
    bare = [".".join(place) for place, parts in places.items() if "down" in parts and place not in magnitudes]
    bare = [name for name in bare if configs.get(name.partition(".")[0], AdapterConfig()).dora]
    if bare:
        raise WeightSourceError(
            f"The config of {source.name} says use_dora, but {len(bare)} layers have no magnitude: "
            f"{keys.grouped(bare)}. Download the file again."
        )
    wrong = [key for key in taken if not source.dtypes[key].is_floating_point]
    if wrong:
        raise WeightSourceError(f"{wrong[0]} of {source.name} is {source.dtypes[wrong[0]]}, not floating point.")
    return Kin(tuple(layers), magnitudes, biases, _without(source, taken))


def bias_layers(kin: Kin, pairs: Iterable[LoraLayer]) -> tuple[KinLayer, ...]:
    """The biases that PEFT trains with a LoRA (`lora_bias`), at the strength of their pairs."""
    return tuple(
        KinLayer(pair.component, pair.module, "bias", "whole", {"whole": key}, pair.scale)
        for pair in pairs
        if (key := kin.biases.get((pair.component, pair.module))) is not None
    )


def kin_shape(source: WeightSource, layer: KinLayer, wanted: _Shape | None) -> _Shape:
    """Shape of the parameter that a layer changes: `wanted` (the model's) if the numbers fit it.

    Without a model the name tells the kernel of a convolution that the factors hold as a matrix.
    """
    shape = _SHAPES[layer.kind](source, layer.parts)
    kernel = _KERNELS.get(layer.module.rpartition(".")[2])
    if wanted is None and len(shape) == 2 and kernel is not None and shape[1] % kernel**2 == 0:
        return (shape[0], shape[1] // kernel**2, kernel, kernel)
    same = wanted is not None and wanted[:1] == shape[:1] and torch.Size(wanted).numel() == torch.Size(shape).numel()
    return wanted if same and wanted is not None else shape


def kin_change(source: WeightSource, layer: KinLayer, device: torch.device) -> torch.Tensor:
    """The change in fp32, in a shape that can be viewed as the parameter's; whatever autocast says."""
    tensors = {role: source[key].detach().to(device, torch.float32) for role, key in layer.parts.items()}
    with torch.autocast(device.type, enabled=False):
        change = _CHANGES[layer.kind](tensors)
    return change * layer.scale  # a copy: the tensors of the source stay as they are


def kin_bound(source: WeightSource, layer: KinLayer) -> float:
    """What no number of the change exceeds, from its tensors alone; NaN or Inf if one of them has any."""
    if layer.kind == "whole":
        low, high = source.extremes(layer.parts["whole"])
        return max(abs(low), abs(high)) * abs(layer.scale)
    bound = abs(layer.scale)
    for key in layer.parts.values():  # a product of sums is below the product of norms
        bound *= source[key].detach().float().norm().item()
    return bound


def magnitude_bound(source: WeightSource, key: str) -> float:
    """What no number of a weight exceeds that DoRA gives the magnitude `key`: none is above its row's norm."""
    low, high = source.extremes(key)
    return max(abs(low), abs(high))


def dora_change(source: WeightSource, key: str, base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """W' - W in fp32 for W = `base`: the magnitude `key`, one number per output or per input, says which norm.

    Rows of zeros stay zero. Computed on the device of `change`, which is used up.
    """
    with torch.autocast(change.device.type, enabled=False):
        base = base.detach().to(change.device, torch.float32)
        magnitude = source[key].detach().to(change.device, torch.float32)
        axis = magnitude_axis(source, key, tuple(base.shape))
        aside = [dim for dim in range(base.dim()) if dim != axis]
        whole = change.add_(base)
        norm = torch.linalg.vector_norm(whole, dim=aside, keepdim=True)
        factor = magnitude.reshape([-1 if dim == axis else 1 for dim in range(base.dim())]) / norm
        return whole.mul_(torch.where(norm == 0, 0.0, factor)).sub_(base)


def magnitude_axis(source: WeightSource, key: str, shape: _Shape) -> int:
    """0 if a magnitude has a number per output (PEFT, LyCORIS), 1 if per input (LyCORIS before 3.0).

    Raises `WeightSourceError` if it is neither.
    """
    given = source.shapes[key]
    long = [size for size in given if size != 1]
    per_output = "lora_magnitude_vector" in key or len(given) < 2 or given[0] == shape[0]
    axis = 0 if per_output else 1
    if len(shape) < 2 or torch.Size(given).numel() != shape[axis] or len(long) > 1:
        raise WeightSourceError(f"{key} of {source.name} {given} is no magnitude for a weight of shape {shape}.")
    return axis


def _layers(source: WeightSource, place: tuple[str, str], parts: _Parts, config: AdapterConfig) -> list[KinLayer]:
    """The layers at one place."""
    found = []
    for kind, start in (("loha", "hada_"), ("lokr", "lokr_")):
        own = {role: key for role, key in parts.items() if role.startswith(start)}
        if own:
            rank = _RANKS[kind](source, place, own)
            found.append(KinLayer(*place, "weight", kind, own, _strength(source, place[1], parts, rank, config)))
    for role, parameter in (("diff", "weight"), ("diff_b", "bias")):
        if role in parts:
            found.append(KinLayer(*place, parameter, "whole", {"whole": parts[role]}, 1.0))
    return found


def _strength(source: WeightSource, module: str, parts: _Parts, rank: int | None, config: AdapterConfig) -> float:
    """alpha / rank; a LoKr of two whole factors has no rank, and its alpha counts only in PEFT's config."""
    if "alpha" in parts:
        return number(source, parts["alpha"]) / rank if rank else 1.0
    rank = rank or config.rank_of(module)
    return config.alpha_of(module, rank) / rank if rank else 1.0


def _loha_rank(source: WeightSource, place: tuple[str, str], parts: _Parts) -> int:
    """The rank of a LoHa, its shapes checked."""
    shapes = {role: source.shapes[key] for role, key in parts.items()}
    cores = {"hada_t1", "hada_t2"} & set(parts)
    fits = set(_LOHA) <= set(parts) and len(cores) in (0, 2) and all(len(shapes[role]) == 2 for role in _LOHA)
    if fits:
        rank = shapes["hada_w1_b"][0]
        inner, outer = (0, 1) if cores else (1, 0)
        for one in ("1", "2"):
            left, right = shapes[f"hada_w{one}_a"], shapes[f"hada_w{one}_b"]
            fits = fits and left[inner] == right[0] > 0
            fits = fits and (left[outer], right[1]) == (shapes["hada_w1_a"][outer], shapes["hada_w1_b"][1])
            if cores:
                core = shapes[f"hada_t{one}"]
                fits = fits and core[:2] == (left[0], right[0]) and core[2:] == shapes["hada_t1"][2:]
    if not fits:
        raise _misfit(source, place, shapes, "hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b")
    return rank


def _lokr_rank(source: WeightSource, place: tuple[str, str], parts: _Parts) -> int | None:
    """The rank of a LoKr, its shapes checked; None if both factors are whole."""
    shapes = {role: source.shapes[key] for role, key in parts.items()}
    rank, fits = None, "lokr_t1" not in parts
    for one in ("1", "2"):
        whole, left, right, core = (
            shapes.get(f"lokr_{what}") for what in (f"w{one}", f"w{one}_a", f"w{one}_b", f"t{one}")
        )
        if whole is not None:
            fits = fits and left is right is core is None and len(whole) >= 2
        elif left is not None and right is not None:
            rank = right[0]
            fits = fits and len(left) == 2 and len(right) >= 2 and left[0 if core else 1] == rank > 0
            fits = fits and (core is None or (core[:2] == (left[0], right[0]) and len(core) > 2))
        else:
            fits = False
    if not fits:
        raise _misfit(source, place, shapes, "lokr_w1 or lokr_w1_a and _b, lokr_w2 or lokr_w2_a and _b")
    return rank


def _misfit(
    source: WeightSource, place: tuple[str, str], shapes: Mapping[str, _Shape], wanted: str
) -> WeightSourceError:
    shown = ", ".join(f"{role} {shape}" for role, shape in shapes.items())
    return WeightSourceError(
        f"The factors of {'.'.join(place)} in {source.name} do not belong together ({shown}). Expected {wanted}, of "
        "one rank. Download the file again."
    )


def _loha_shape(source: WeightSource, parts: _Parts) -> _Shape:
    left, right = source.shapes[parts["hada_w1_a"]], source.shapes[parts["hada_w1_b"]]
    if "hada_t1" in parts:
        return (left[1], right[1], *source.shapes[parts["hada_t1"]][2:])
    return (left[0], right[1])


def _lokr_shape(source: WeightSource, parts: _Parts) -> _Shape:
    first, second = (_half_shape(source, parts, one) for one in ("1", "2"))
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _half_shape(source: WeightSource, parts: _Parts, one: str) -> _Shape:
    if f"lokr_w{one}" in parts:
        return source.shapes[parts[f"lokr_w{one}"]]
    left, right = source.shapes[parts[f"lokr_w{one}_a"]], source.shapes[parts[f"lokr_w{one}_b"]]
    if f"lokr_t{one}" in parts:
        return (left[1], right[1], *source.shapes[parts[f"lokr_t{one}"]][2:])
    return (left[0], *right[1:])


def _loha(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, second = (
        _joined(tensors.get(f"hada_t{one}"), tensors[f"hada_w{one}_a"], tensors[f"hada_w{one}_b"])
        for one in ("1", "2")
    )
    return first.mul_(second)


def _lokr(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, second = (
        tensors[f"lokr_w{one}"]
        if f"lokr_w{one}" in tensors
        else _joined(tensors.get(f"lokr_t{one}"), tensors[f"lokr_w{one}_a"], tensors[f"lokr_w{one}_b"])
        for one in ("1", "2")
    )
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - first.dim())), second)


def _joined(core: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, or both with the core of a Tucker decomposition between them."""
    if core is None:
        return torch.mm(left, right.flatten(1)).reshape(left.shape[0], *right.shape[1:])
    return torch.einsum("ij...,ip,jr->pr...", core, left, right)


_RANKS = {"loha": _loha_rank, "lokr": _lokr_rank}
_SHAPES = {
    "loha": _loha_shape,
    "lokr": _lokr_shape,
    "whole": lambda source, parts: source.shapes[parts["whole"]],
}
_CHANGES = {"loha": _loha, "lokr": _lokr, "whole": lambda tensors: tensors["whole"]}


def _without(source: WeightSource, taken: set[str]) -> WeightSource:
    """The source without some of its tensors."""
    if not taken:
        return source
    return replace(
        source,
        shapes=MappingProxyType({key: shape for key, shape in source.shapes.items() if key not in taken}),
        dtypes=MappingProxyType({key: dtype for key, dtype in source.dtypes.items() if key not in taken}),
    )
