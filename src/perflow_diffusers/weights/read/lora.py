"""LoRAs and packed deltas seen as plain deltas, tensor by tensor: `as_delta(source)`."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.adapter_config import adapter_configs
from perflow_diffusers.weights.read.lora_kin import (
    KinLayer,
    bias_layers,
    dora_change,
    kin_bound,
    kin_change,
    kin_shape,
    magnitude_axis,
    magnitude_bound,
    split_kin,
)
from perflow_diffusers.weights.read.lora_layers import (
    ADAPTER_METADATA,
    LoraLayer,
    adapter_metadata,
    lora_layers,
    warn_of_bundled,
)
from perflow_diffusers.weights.read.lora_names import KOHYA_PREFIXES
from perflow_diffusers.weights.read.source import WeightSource, check_detached, open_weights
from perflow_diffusers.words.notices import warn_user
from perflow_diffusers.words.shown import shown

__all__ = [
    "ADAPTER_METADATA",
    "RESIDUAL_KEY",
    "LoraLayer",
    "Rebuilt",
    "adapter_metadata",
    "as_delta",
    "lora_layers",
    "open_residual",
    "weight_name",
]

#: Header key of a LoRA that names the file beside it with what a LoRA cannot carry.
RESIDUAL_KEY = "perflow_residual"

_CPU = torch.device("cpu")
_SAFE = 100.0  # bounds below this need no exact look: sums overflow fp16 only at scales of hundreds


@shown
@dataclass(frozen=True, eq=False, kw_only=True)
class Rebuilt(WeightSource):
    """A delta in fp32 whose tensors are computed, on the device where they are used, from a more compact form.

    `covers_all` says whether it covers all weights of a model, or only some as a LoRA does; `made_of` are the
    arguments of `as_delta` that it came from; `on_base` names tensors that depend on the weight to which they are
    added (DoRA's), which `near` must be told; `residual` is the file that goes with a LoRA, opened and in it already.
    """

    build: Callable[[str, torch.device, torch.Tensor | None], torch.Tensor]
    bounds: Callable[[str], tuple[float, float]]
    covers_all: bool
    made_of: tuple[WeightSource, dict[str, tuple[int, ...]]] = field(repr=False)
    on_base: frozenset[str] = frozenset()
    residual: WeightSource | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple:
        return _made_again, self.made_of

    @cached_property
    def kind(self) -> str:
        """ "lora" or "delta"."""
        return "delta" if self.covers_all else "lora"

    @property
    def partial(self) -> bool:
        """Whether it is meant to cover only some weights of a model."""
        return not self.covers_all

    def extremes(self, name: str) -> tuple[float, float]:
        """Bounds of a tensor's numbers, from its compact form; exact if they are large or not finite.

        Of what depends on the base, bounds at any size: no number of W' or of the factors' change is larger.
        """
        low, high = self.bounds(name)
        return (low, high) if max(-low, high) < _SAFE or name in self.on_base else super().extremes(name)

    def near(self, name: str, device: torch.device, base: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, computed on `device`."""
        return self.build(name, device, base)


def as_delta(
    source: WeightSource,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    on_base: bool = False,
    with_text: bool = False,
) -> WeightSource:
    """`source`, a LoRA or an int8 delta, as a lazy delta in fp32 under canonical names; a plain delta as it is.

    A LoRA (all layouts) becomes up @ down * alpha / rank for linear layers and convolutions, its kin (LoHa, LoKr,
    whole differences, biases) what `lora_kin` says; only the part for the UNet, with one warning if there are text
    encoder layers. If its header names a residual (`perflow_residual`), that file is opened beside it and added. An
    int8 delta becomes q * scale, per output channel. Tensors are computed one at a time, when they are read.

    A DoRA changes every base in another way: it is taken only if the caller says `on_base`, and then tells `near` the
    weight of the base. The delta is W' - W: a scale takes its share of the whole change.

    `shapes` are those of the model's weights, if one is at hand: kohya's names are then looked up among its modules
    first, and a factor pair without the trailing 1 x 1 of a convolution is given it. `with_text` keeps text encoder
    layers, under `text_encoder.<module>.weight`, for whoever writes another LoRA.

    Raises `WeightSourceError` for a LoRA that is damaged, of a kind that cannot be computed, or whose residual is
    missing, and for a DoRA without `on_base`.
    """
    source = open_weights(source)
    if isinstance(source, Rebuilt):
        return source
    check_detached(source)
    if source.kind == "lora":
        return _lora_as_delta(source, shapes or {}, on_base=on_base, with_text=with_text)
    adapter_configs(source, KOHYA_PREFIXES)  # PEFT's other kinds, whose tensors have no names of LoRA's
    packed = [
        name for name, dtype in source.dtypes.items() if dtype == torch.int8 and f"{name}.scale" in source.shapes
    ]
    return _packed_as_delta(source, packed) if packed else source


def open_residual(source: WeightSource) -> WeightSource:
    """What a LoRA cannot carry (biases, norms, ...): the file that its header names, beside it; empty if none.

    Raises `WeightSourceError` if the file is missing or the name leads elsewhere.
    """
    name = source.metadata.get(RESIDUAL_KEY)
    if not name:
        return open_weights({})
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise WeightSourceError(f"{source.name} names a residual that is not a .safetensors file beside it: {name!r}.")
    path = source.files[0].with_name(name) if source.files else None
    if path is None or not path.is_file():
        raise WeightSourceError(
            f"{source.name} comes with a residual, {name}, which is not beside it. Put it there (both files belong "
            "together), or merge its tensors without this header to leave the residual out."
        )
    return open_weights(path)


def _lora_as_delta(
    source: WeightSource, model: Mapping[str, tuple[int, ...]], *, on_base: bool, with_text: bool
) -> Rebuilt:
    kin = split_kin(source, model)
    pairs = lora_layers(kin.rest, model) if kin.rest else ()
    every: tuple[LoraLayer | KinLayer, ...] = (*pairs, *kin.layers, *bias_layers(kin, pairs))
    layers = {weight_name(layer): layer for layer in every if layer.component == "unet" or _kept(layer, with_text)}
    text = [layer for layer in every if layer.component != "unet" and not _kept(layer, with_text)]
    if any(isinstance(layer, KinLayer) for layer in text):
        way_out = "Use the tool that made the file if you need them: diffusers loads low-rank pairs only."
    else:
        way_out = "Use `pipe.load_lora_weights(...)` instead if you need them."
    if not layers:
        raise WeightSourceError(f"{source.name} has no layer for a UNet ({len(text)} for text encoders). {way_out}")
    warn_of_bundled(source)
    if text:
        warn_user(
            f"{len(text)} layers of {source.name} are for text encoders and are left out: only the UNet is changed "
            f"here. {way_out}"
        )
    magnitudes = {f"{module}.weight": key for (part, module), key in kin.magnitudes.items() if part == "unet"}
    if (kin.magnitudes if with_text else magnitudes) and not on_base:
        raise WeightSourceError(
            f"{source.name} is a DoRA ({len(kin.magnitudes)} magnitudes): what it changes depends on the weights of "
            "the base. Merge it into its base with `merge_files(base, dora, out)`, and use `compute_delta(base, out)`."
        )
    beside = open_residual(source)
    residual = as_delta(beside)
    rest, collisions = residual.canonical
    shapes = {name: _shape(source, layer, model.get(name)) for name, layer in layers.items()}
    for name, key in magnitudes.items():
        magnitude_axis(source, key, shapes[name])
    wrong = [name for name, key in rest.items() if residual.shapes[key] != shapes.get(name, residual.shapes[key])]
    if collisions or wrong:
        shown = keys.grouped(wrong) or f"{collisions[0][0]} and {collisions[0][1]} are one weight"
        raise WeightSourceError(f"{residual.name} does not fit {source.name}: {shown}. They are not of one delta.")
    shapes |= {name: residual.shapes[key] for name, key in rest.items()}

    def build(name: str, device: torch.device, base: torch.Tensor | None) -> torch.Tensor:
        parts = []
        if name in layers:
            change = _product(source, layers[name], device).reshape(shapes[name])
            if name in magnitudes:
                if base is None:
                    raise WeightSourceError(f"{name} of {source.name} is a DoRA's: it needs the weight of the base.")
                base = base[:, : shapes[name][1]]  # of a wider conv_in, the channels of the noisy latent
                change = dora_change(source, magnitudes[name], base, change)
            parts.append(change)
        if name in rest:
            parts.append(residual.near(rest[name], device).detach().to(device, torch.float32))
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    def bounds(name: str) -> tuple[float, float]:
        bound = _change_bound(source, layers[name]) if name in layers else 0.0
        if name in magnitudes:
            bound += magnitude_bound(source, magnitudes[name])
        low, high = residual.extremes(rest[name]) if name in rest else (0.0, 0.0)
        return low - bound, high + bound

    dtypes = dict.fromkeys(shapes, torch.float32)
    on = frozenset(magnitudes)
    return _rebuilt(source, shapes, dtypes, build, bounds, covers_all=False, model=model, on_base=on, residual=beside)


def weight_name(layer: LoraLayer | KinLayer) -> str:
    """What a layer changes: a canonical name for a UNet, with the component before it for a text encoder."""
    name = f"{layer.module}.{layer.parameter if isinstance(layer, KinLayer) else 'weight'}"
    return name if layer.component == "unet" else f"{layer.component}.{name}"


def _kept(layer: LoraLayer | KinLayer, with_text: bool) -> bool:
    """Whether another LoRA can hold the change of a text encoder's layer: it has no residual for whole differences."""
    return with_text and not (isinstance(layer, KinLayer) and layer.kind == "whole")


def _shape(source: WeightSource, layer: LoraLayer | KinLayer, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    if isinstance(layer, KinLayer):
        return kin_shape(source, layer, wanted)
    return _product_shape(source, layer, wanted)


def _product_shape(source: WeightSource, layer: LoraLayer, wanted: tuple[int, ...] | None) -> tuple[int, ...]:
    """(out, in) or (out, in, height, width) of the weight that a layer changes."""
    down, up = source.shapes[layer.down], source.shapes[layer.up]
    kernel = down[2:] if layer.mid is None else source.shapes[layer.mid][2:]
    shape = (up[0], down[1], *kernel)
    same = wanted is not None and wanted[:2] == shape[:2] and all(size == 1 for size in (*wanted[2:], *kernel))
    return wanted if same and wanted is not None else shape


def _product(source: WeightSource, layer: LoraLayer | KinLayer, device: torch.device) -> torch.Tensor:
    """up @ down * alpha / rank in fp32, (out, everything else), or what the kin of a LoRA make; no autocast."""
    if isinstance(layer, KinLayer):
        return kin_change(source, layer, device)
    up, down = (source[key].detach().to(device, torch.float32).flatten(1) for key in (layer.up, layer.down))
    with torch.autocast(device.type, enabled=False):
        if layer.mid is None:
            return torch.mm(up, down).mul_(layer.scale)
        mid = source[layer.mid].detach().to(device, torch.float32)
        return torch.einsum("op,pqkl,qi->oikl", up, mid, down).mul_(layer.scale).flatten(1)


def _change_bound(source: WeightSource, layer: LoraLayer | KinLayer) -> float:
    """What no number of a product exceeds (Cauchy-Schwarz over the inner axis); NaN or Inf if a factor has any."""
    if isinstance(layer, KinLayer):
        return kin_bound(source, layer)
    up, down = (source[key].detach().float().flatten(1) for key in (layer.up, layer.down))
    middle = source[layer.mid].detach().float().norm().item() if layer.mid is not None else 1.0
    return up.norm(dim=1).max().item() * middle * down.norm(dim=0).max().item() * abs(layer.scale)


def _packed_as_delta(source: WeightSource, packed: list[str]) -> Rebuilt:
    """Tensors `name` (int8) and `name.scale` (a number per output channel) as q * scale; the others as they are."""
    scales = {f"{name}.scale" for name in packed}
    wrong = [
        name
        for name in packed
        if source.shapes[f"{name}.scale"] != source.shapes[name][:1]
        or not source.dtypes[f"{name}.scale"].is_floating_point
    ]
    if wrong:
        raise WeightSourceError(
            f"{source.name} has int8 tensors whose scales do not fit, one number per output channel: "
            f"{keys.grouped(wrong)}. Make it again with `shrink_delta`."
        )
    held = frozenset(packed)
    shapes = {name: shape for name, shape in source.shapes.items() if name not in scales}
    dtypes = {name: torch.float32 if name in held else source.dtypes[name] for name in shapes}

    def build(name: str, device: torch.device, base: torch.Tensor | None) -> torch.Tensor:
        if name not in held:
            return source.near(name, device)
        scale = source[f"{name}.scale"].detach().to(device, torch.float32)
        whole = source[name].detach().to(device, torch.float32)
        return whole.mul_(scale.reshape(-1, *[1] * (whole.dim() - 1)))

    def bounds(name: str) -> tuple[float, float]:
        if name not in held:
            return source.extremes(name)
        low, high = source.extremes(f"{name}.scale")
        bound = 128 * max(abs(low), abs(high))
        return -bound, bound

    return _rebuilt(source, shapes, dtypes, build, bounds, covers_all=True, model={})


def _rebuilt(
    source: WeightSource,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    build: Callable[[str, torch.device, torch.Tensor | None], torch.Tensor],
    bounds: Callable[[str], tuple[float, float]],
    *,
    covers_all: bool,
    model: Mapping[str, tuple[int, ...]],
    on_base: frozenset[str] = frozenset(),
    residual: WeightSource | None = None,
) -> Rebuilt:
    return Rebuilt(
        source.name,
        MappingProxyType(dict(shapes)),
        MappingProxyType(dict(dtypes)),
        lambda name: build(name, _CPU, None),
        source.metadata,
        source.files,
        build=build,
        bounds=bounds,
        covers_all=covers_all,
        made_of=(source, dict(model)),
        on_base=on_base,
        residual=residual,
    )


def _made_again(source: WeightSource, model: dict[str, tuple[int, ...]]) -> WeightSource:
    """What was pickled; its warnings were given when it was made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return as_delta(source, model, on_base=True)
