"""Weights by canonical names, or an error: `canonical_names(source)`, of complete ones `named_weights(anything)`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.single_file import unet_of_single_file
from perflow_diffusers.weights.read.source import WeightSource, check_detached, open_weights


def named_weights(anything: Any) -> tuple[WeightSource, Mapping[str, str]]:
    """A source of complete weights of a UNet and its `{canonical name: key}`; original-format files through diffusers.

    `anything` is what `compute_delta` takes. Raises `DeltaError` for a LoRA, empty weights, and doubled names.
    """
    source = open_weights(anything)
    check_detached(source)
    if source.kind == "lora":
        raise DeltaError(
            f"{source.name} is a LoRA, not complete weights. `merge_delta` takes it as it is; for the difference that "
            "it makes, pass a UNet that it is merged into."
        )
    if source.kind == "delta":
        raise DeltaError(
            f"{source.name} is a delta, not complete weights. Pass the base and the tuned model themselves; "
            "`merge_delta` and `perflow merge` add a delta to a model."
        )
    if keys.is_original_format(source):
        source = replace(unet_of_single_file(source), name=source.name, files=source.files)
    names = canonical_names(source)
    if not names:
        raise DeltaError(f"{source.name} is empty. Pass the weights of a UNet.")
    return source, names


def canonical_names(source: WeightSource) -> Mapping[str, str]:
    """`{canonical name: name in the source}`; raises `DeltaError` if two of its tensors are one weight."""
    names, collisions = source.canonical
    if collisions:
        raise DeltaError(f"{source.name} has more than one tensor for a weight: {collisions[0]}. Keep one of each.")
    return names
