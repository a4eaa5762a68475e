"""The config.json of a network, recognised by what it says: `config_beside(source, weights)`."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch

from perflow_diffusers.errors import WeightSourceError
from perflow_diffusers.families import FIRST_LAYERS, TEXT_LAYERS
from perflow_diffusers.io.documents import read_object
from perflow_diffusers.weights.read.source import WeightSource


def config_beside(source: WeightSource, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The config of the network whose `weights` (by canonical name) these are, from the file beside them.

    Raises `WeightSourceError` if there is none, or if it is one of something else: a text encoder, a pipeline in one
    file, a network of other shapes.
    """
    path = source.files[0].with_name("config.json") if source.files else None
    if path is None or not path.is_file():
        raise WeightSourceError(
            f"{source.name} has no config.json beside its weights, which a folder needs. Write a .safetensors file "
            "instead, or pass the folder of the model as the base."
        )
    config = read_object(path, "a network's config")
    wrong = _misfit(config, weights)
    if wrong is not None:
        raise WeightSourceError(
            f"{path} is not the config of the network whose weights lie beside it ({wrong}), and a folder needs that. "
            "Write a .safetensors file instead, or pass the folder of the model as the base."
        )
    return config


def _misfit(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> str | None:
    """Why a config is not the one of these weights, or None."""
    name = config.get("_class_name")
    if name is not None and "UNet" not in str(name):
        return _unlike(str(name), config, weights)
    first = next((weights[name] for name in FIRST_LAYERS if name in weights), None)
    facts = {} if first is None else {"in_channels": [first.shape[1]], "block_out_channels": [first.shape[0]]}
    texts = [tensor for key, tensor in weights.items() if key.endswith(TEXT_LAYERS) and tensor.ndim == 2]
    facts["cross_attention_dim"] = sorted({tensor.shape[1] for tensor in texts})
    said = {key: _first(config[key]) for key in facts if config.get(key) is not None}
    if name is None and not {"in_channels", "block_out_channels"} <= set(said):
        return "it says neither its class nor its channels"
    for key, value in said.items():
        if facts[key] and value not in facts[key]:
            return f"{key} is {config[key]!s:.50}, and the weights have {', '.join(map(str, facts[key]))}"
    return None


def _unlike(name: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> str | None:
    """Why a model of diffusers' class `name` with this config has other weights, or None: it is built without any."""
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        return f"it is one of {name:.50}"
    try:
        with torch.device("meta"):
            model: Any = kind.from_config(dict(config))
    except (TypeError, ValueError) as error:
        return f"{name:.50} cannot be built from it: {error!s:.200}"
    have = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    wrong = sorted(key for key in have.keys() | weights.keys() if have.get(key) != _shape(weights.get(key)))
    return f"it is one of {name:.50}, which has others: {', '.join(wrong[:3])}" if wrong else None


def _shape(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _first(value: Any) -> Any:
    """The number, or the first block's."""
    return value[0] if isinstance(value, list) and value else value
