"""The teacher as its product needs it: its weights in float32, one at a time, and what it says about itself."""

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families import ANY_COMPONENTS, networks_of, sole_network
from perflow_diffusers.io.documents import read_json
from perflow_diffusers.weights import WeightSource, open_weights
from perflow_diffusers.weights.read.keys import canonical_map
from perflow_diffusers.words.shown import shown
from perflow_training.errors import ConfigError
from perflow_training.lazy import as_source, read_afresh
from perflow_training.teacher.encode import Pipeline


@shown
@dataclass(frozen=True, eq=False)
class Base:
    """`weights` in float32 by canonical name; `network` of their shapes, perhaps without numbers (on the meta device).

    `component` is what the pipeline calls it; `pipeline` the folder, or the loaded pipeline, for those who ask for
    scheduler and signature.
    """

    weights: WeightSource
    network: nn.Module
    component: str
    pipeline: Path | Pipeline


def base_in_folder(folder: Path, variant: str | None, name: str) -> Base | None:
    """The base in a pipeline's `folder`, of which no more than a tensor is in memory at a time; `name` is for people.

    None for one that must be loaded whole: weights that are not safetensors, of a variant that lies beside others, or
    under names that diffusers translates.
    """
    try:
        source = open_weights(folder)
    except WeightSourceError:
        return None
    marked = [f".{variant}." in file.name or f".{variant}-" in file.name for file in source.files]
    if variant is not None and not all(marked):
        return None
    component, network = _empty(folder)
    names, collisions = canonical_map(source)
    if network is None or collisions:
        return None
    shapes = {key: source.shapes[own] for key, own in names.items()}
    if shapes != {key: tuple(value.shape) for key, value in network.state_dict().items()}:
        return None
    fresh = read_afresh(source)
    weights = WeightSource(
        name,
        MappingProxyType(shapes),
        MappingProxyType(dict.fromkeys(shapes, torch.float32)),
        lambda key: fresh[names[key]].float(),
    )
    return Base(weights, network, component, folder)


def loaded_base(pipe: Pipeline, name: str) -> Base:
    """The base of a pipeline in memory, in float32."""
    network = sole_network(pipe, ConfigError)
    component = next(iter(networks_of(pipe)))
    return Base(as_source(open_weights(network), name), network, component, pipe)


def _empty(folder: Path) -> tuple[str, nn.Module | None]:
    """(component, network) that a pipeline's folder describes, on the meta device; None for one not of diffusers."""
    for component in ANY_COMPONENTS:
        place = folder / component
        config = read_json(place / "config.json") if (place / "config.json").is_file() else {}
        kind = getattr(diffusers, str(config.get("_class_name")), None)
        if isinstance(kind, type) and issubclass(kind, ModelMixin):
            with init_empty_weights():
                return component, kind.from_config(config)
    return "", None
