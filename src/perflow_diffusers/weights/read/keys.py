"""Names only, no tensors: a *canonical* name is a key of a plain `UNet2DConditionModel.state_dict()`."""

import re
from collections import Counter
from collections.abc import Collection, Iterable

from perflow_diffusers.families import ANY_COMPONENTS, NETWORKS

ORIGINAL_PREFIX = "model.diffusion_model."
EMA_PREFIX = "model_ema.diffusion_model"

_ADAPTER = re.compile(r"(^|\.)(lora_|lokr_|loha_|hada_|oft_|vera_|modules_to_save\.)|\.alpha$|\.dora_scale$")
_LORA = re.compile(
    r"(^|[._])lora_(A|B|up|down|mid|unet|te\d?)[._]|\.lora(_linear_layer)?\.(up|down)\.|_lora\.(up|down)\."
    r"|\.dora_scale$|\.(hada|lokr|oft)_\w+(\.[^.]+)?(\.weight)?$|\.(diff|diff_b|w_norm|b_norm|set_weight)$"
)
_LORA_WORDS = (
    "lora",
    "dora_",
    "hada_",
    "lokr_",
    "oft_",
    ".diff",
    "w_norm",
    "b_norm",
    "set_weight",
)  # no name without one of them can match: a fast first look
_EXTENSION = re.compile("|".join(pattern for network in NETWORKS for pattern in network.extensions))
_ORIGINAL = re.compile(
    rf"{re.escape(ORIGINAL_PREFIX)}|{re.escape(EMA_PREFIX)}|(diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.\d"
)


def canonical(name: str) -> str | None:
    """Canonical form of one key of a UNet's state dict, or None for a tensor that belongs to an adapter.

    Removes what wrappers add: `_orig_mod.` (torch.compile), a leading `module.` (data parallel), `.base_layer.` and
    `.original_module.` (PEFT). `to_q.base_layer.weight` is `to_q.weight`; `to_q.lora_A.default.weight` is None.
    """
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
    return None if _ADAPTER.search(name) else name


def canonical_map(names: Iterable[str]) -> tuple[dict[str, str], tuple[tuple[str, str], ...]]:
    """`{canonical name: name}` of all tensors that belong to no adapter, and the pairs of names that collide.

    The name of a component before all of them, as in `unet.conv_in.weight`, is removed.
    """
    names = list(names)
    prefixes = (f"{component}." for component in ANY_COMPONENTS)
    prefix = next((one for one in prefixes if names and all(name.startswith(one) for name in names)), "")
    found: dict[str, str] = {}
    collisions = []
    for name in names:
        plain = canonical(name.removeprefix(prefix))
        if plain is None:
            continue
        if plain in found:
            collisions.append((found[plain], name))
        found.setdefault(plain, name)
    return found, tuple(collisions)


def is_extension(name: str) -> bool:
    """Whether a canonical name belongs to a module that people add and that no delta has to know."""
    return _EXTENSION.search(name) is not None


def is_lora(names: Iterable[str]) -> bool:
    """Whether any of the names is a LoRA factor in the layout of diffusers, PEFT or kohya, or of one of LoRA's kin."""
    names = list(names)
    text = " ".join(names)
    return any(word in text for word in _LORA_WORDS) and any(_LORA.search(name) for name in names)


def has_adapters(names: Collection[str]) -> bool:
    """Whether these are names of a model saved with PEFT's adapters attached (`to_q.base_layer.weight`)."""
    wrapped = any(".base_layer." in name for name in names)
    return wrapped and any(_ADAPTER.search(name) for name in names)


def is_original_format(names: Iterable[str]) -> bool:
    """Whether the names are those of an original-format checkpoint or UNet, not of a LoRA in its spelling.

    `model.diffusion_model.input_blocks...`, also with less of the prefix, or only the EMA (`model_ema...`).
    """
    names = list(names)
    return any(_ORIGINAL.match(name) for name in names) and not is_lora(names)


def grouped(names: Iterable[str], limit: int = 6) -> str:
    """Names in words for an error message: all of them up to `limit`, else counts per block and one example each."""
    names = sorted(names)
    if len(names) <= limit:
        return ", ".join(names)
    blocks = Counter(_block(name) for name in names)
    example = {_block(name): name for name in reversed(names)}
    parts = [f"{block} ({count}, e.g. {example[block]})" for block, count in blocks.most_common(limit)]
    more = len(blocks) - len(parts)
    return ", ".join(parts) + (f" and {more} more groups" if more > 0 else "")


def by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """`{block: its names}`, a block as in `down_blocks.0` or `conv_in`, in the order in which they come."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_block(name), []).append(name)
    return found


def _block(name: str) -> str:
    """`down_blocks.0.attentions.1.x.weight` -> `down_blocks.0`; `conv_in.weight` -> `conv_in`."""
    parts = name.removeprefix("unet.").split(".")  # as LoRAs have it
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
