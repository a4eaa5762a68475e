"""What a file, folder or repository of weights is, for people and for scripts: `describe_weights(source)`."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families import TEXT_LAYERS, family_in_words
from perflow_diffusers.io.documents import parsed
from perflow_diffusers.io.names import HubOptions
from perflow_diffusers.io.tensors import dtype_name
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.lora_kin import kin_shape, split_kin
from perflow_diffusers.weights.read.lora_layers import lora_layers, named_tensors
from perflow_diffusers.weights.read.lora_names import KIN_ROLES
from perflow_diffusers.weights.read.original_file import ema_names, unet_names
from perflow_diffusers.weights.read.source import WeightSource, open_weights
from perflow_diffusers.words.shown import (
    LongTuple,
    aligned,
    html_facts,
    plain,
    shorten,
    shown,
    size_in_words,
)

_EMA_COUNTERS = 2  # `model_ema.decay` and `model_ema.num_updates` are beside the EMA of a UNet

#: header keys that say how a delta is to be used
SETTINGS = (
    "prediction_type",
    "num_time_windows",
    "window_boundaries",
    "recommended_steps",
    "guidance_scale",
    "recommended_guidance_scale",
    "base",
    "tuned",
    "base_hash",
    "base_rounded",
    "base_model",
    "license",
    "licence",
    "solve_guidance",
    "perflow_residual",
)


@shown
@dataclass(frozen=True)
class WeightsInfo:
    """What weights are, without reading their numbers.

    `kind` is "delta", "lora" or "weights", `form` the layout within it (delta-1, delta-int8-1, diffusers LoRA, kohya
    LoRA, original checkpoint or UNet, with or without EMA), `family` the kind of model in words, `dtypes` counts
    tensors by dtype, `ranks` LoRA layers by rank; `settings` is what the header says of the use.
    """

    name: str
    kind: str
    form: str
    family: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    ranks: Mapping[int, int]
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        shorten(self)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return plain(self)

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Names and values for people."""
        size = f"{self.tensors} tensors, {self.parameters / 1e6:.2f} M numbers, {size_in_words(self.nbytes)}"
        rows = [
            ("what", f"{self.kind} ({self.form}) for {self.family}" if self.form != self.kind else self.kind),
            ("size", size),
            ("stored as", ", ".join(f"{name} ({count})" for name, count in self.dtypes.items())),
        ]
        if self.ranks:
            rows.append(
                (
                    "ranks",
                    ", ".join(
                        f"{rank} ({count} layer{'s' if count != 1 else ''})" for rank, count in self.ranks.items()
                    ),
                )
            )
        return LongTuple(rows + [(key, str(value)) for key, value in self.settings.items()])

    def __str__(self) -> str:
        return "\n".join([self.name, *aligned(self.facts)])

    def _repr_html_(self) -> str:
        return html_facts(self.name, self.facts)


def describe_weights(source: Any, **where: Unpack[HubOptions]) -> WeightsInfo:
    """Say what `source` is, anything that `open_weights` takes with `where` as its options; reads headers only.

    Raises `WeightSourceError` for what cannot be found or read.
    """
    weights = open_weights(source, **where)
    names, _ = weights.canonical
    shapes = {name: weights.shapes[key] for name, key in names.items()}
    form, family = weights.kind, family_in_words(shapes)
    ranks: dict[int, int] = {}
    if keys.has_adapters(weights):
        form = "saved with adapters attached"
    elif weights.kind == "lora":
        form, ranks, family = _lora(weights)
    elif keys.is_original_format(weights):
        form, family = _original(weights)
    elif weights.kind == "delta":
        form = weights.metadata.get("perflow_format", "delta")
    return WeightsInfo(
        name=weights.name,
        kind=weights.kind,
        form=form,
        family=family,
        tensors=len(weights),
        parameters=sum(torch.Size(shape).numel() for shape in weights.shapes.values()),
        nbytes=weights.nbytes,
        dtypes=dict(Counter(dtype_name(dtype) for dtype in weights.dtypes.values()).most_common()),
        ranks=ranks,
        settings={key: _value(weights.metadata[key]) for key in SETTINGS if key in weights.metadata},
    )


def _original(weights: WeightSource) -> tuple[str, str]:
    """Form and family of an original-format file."""
    names, means = unet_names(weights), ema_names(weights)
    read = names or means
    rest = len(weights) - len(names) - len(means)
    form = "original checkpoint" if rest > _EMA_COUNTERS else "original UNet"
    form += (", with EMA weights" if names else ", EMA weights only") if means else ""
    shapes = {name: weights.shapes[key] for name, key in read.items()}
    told = any(name.endswith(TEXT_LAYERS) for name in shapes)
    return form, family_in_words(shapes) if told else "diffusers' from_single_file"


def _lora(weights: WeightSource) -> tuple[str, dict[int, int], str]:
    """Layout or kinds, low-rank layers by rank, and the family that the text width of a change tells."""
    try:
        kin = split_kin(weights, {})
        layers = lora_layers(kin.rest) if kin.rest else ()
    except WeightSourceError:
        return "an unsupported kind of LoRA", {}, "an unknown model"
    shapes = {f"{layer.module}.weight": weights.shapes[layer.down] for layer in layers if layer.component == "unet"}
    shapes |= {f"{one.module}.weight": kin_shape(weights, one, None) for one in kin.layers if one.component == "unet"}
    ranks = Counter(layer.rank for layer in layers)
    roles = {name.role for name in named_tensors(weights).values()}
    kinds = sorted({KIN_ROLES[role] for role in roles if role in KIN_ROLES})
    layout = "kohya" if any(layer.prefix for layer in layers) else "diffusers"
    form = f"{', '.join(kinds)} layers" if kinds else f"{layout} LoRA"
    told = any(name.endswith(TEXT_LAYERS) for name in shapes)
    family = family_in_words(shapes) if told else "a UNet of unknown width" if shapes else "text encoders alone"
    return form, dict(sorted(ranks.items())), family


def _value(text: str) -> Any:
    """A header's value as it was before it became text."""
    try:
        return parsed(text)
    except ValueError:
        return text
