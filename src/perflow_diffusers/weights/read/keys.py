"""Names only, no tensors: a *canonical* name is a key of a plain `UNet2DConditionModel.state_dict()`."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

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
_EXTENSION = re.compile(
    r"\.processor\.|(^|\.)encoder_hid_proj\.|(^|\.)(motion_modules|motion_module)\.|(^|\.)position_net\.|\.fuser\."
    r"|(^|\.)class_embedding\.|(^|\.)time_embedding\.cond_proj\.|_joint\w*\.|\.to_q?kv\.|(^|\.)image_proj|(^|\.)ref_unet\."
)
_ORIGINAL = re.compile(
    rf"{re.escape(ORIGINAL_PREFIX)}|{re.escape(EMA_PREFIX)}|(diffusion_model\.)?(input_blocks|middle_block|output_blocks)\.\d"
)
_FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "the SDXL refiner", 4096: "a T5-conditioned UNet"}


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

    A leading `unet.` is removed if every name has it.
    """
    names = list(names)
    prefix = "unet." if names and all(name.startswith("unet.") for name in names) else ""
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
    """Whether a canonical name belongs to a module that people add to a UNet and that no delta has to know.

    IP-Adapter, motion modules, GLIGEN, class or camera embeddings, joint attention, guidance embedding, and the
    leftovers of fused projections.
    """
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


def family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """In words, which kind of UNet has these `{canonical name: shape}`, judged by the width of its text embedding."""
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight") and len(shape) == 2:
            width = shape[1]
            return _FAMILIES.get(width, f"a UNet with text embeddings of width {width}")
    return "a model without cross attention"


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
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
