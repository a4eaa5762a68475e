"""Complete weights of a UNet by canonical names: `named_weights(anything)`."""

from dataclasses import replace
from typing import Any

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.single_file import unet_of_single_file
from perflow_diffusers.weights.read.source import WeightSource, check_detached, open_weights


def named_weights(anything: Any) -> tuple[WeightSource, dict[str, str]]:
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
    names, collisions = keys.canonical_map(source)
    if collisions:
        raise DeltaError(f"{source.name} has more than one tensor for a weight: {collisions[0]}. Keep one of each.")
    if not names:
        raise DeltaError(f"{source.name} is empty. Pass the weights of a UNet.")
    return source, names
