"""What a header says of the tensors it came with, and what of it still holds when they are rewritten."""

from collections.abc import Collection, Mapping

#: Of the bytes of one file: sd-webui's and ModelSpec's hashes. No rewritten file has them.
OF_BYTES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")

#: What the diffusers layout has no place for of a kohya file, so that the way back restores every bit.
KOHYA_SPELLING = "perflow_kohya"

#: diffusers' config in a kohya file: under its own key diffusers refuses it beside `.alpha`.
KOHYA_CONFIG = "perflow_lora_config"

#: Of ranks, alphas and the form of layers, as kohya's trainer and resizing write them.
OF_LAYERS = ("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module")


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """A header fit for the same tensors in another file: all but the hashes of the old one's bytes."""
    return {key: value for key, value in metadata.items() if key not in OF_BYTES}


def for_new_tensors(metadata: Mapping[str, str], own: Collection[str] = ()) -> dict[str, str]:
    """A header fit for tensors computed anew: without hashes, ranks, alphas, and the keys `own` to the old file."""
    return {key: value for key, value in metadata.items() if key not in (*OF_BYTES, *OF_LAYERS, *own)}


def network_facts(
    metadata: Mapping[str, str], ranks: Mapping[float, int], alphas: Mapping[float, int]
) -> dict[str, str]:
    """`ss_network_dim` and `ss_network_alpha`: as the header has them if layers have them, else the commonest.

    `ranks` and `alphas` count the layers. What is no number ("Dynamic", of resized LoRAs) stays if the layers differ.
    """
    found = {}
    for key, counts in (("ss_network_dim", ranks), ("ss_network_alpha", alphas)):
        said = metadata.get(key)
        found[key] = said if said is not None and _holds(said, counts) else f"{max(counts, key=counts.__getitem__):g}"
    return found


def _holds(said: str, counts: Mapping[float, int]) -> bool:
    """Whether a fact in a header is true of some of the layers."""
    try:
        return float(said) in counts
    except ValueError:
        return len(counts) > 1
