"""Names of LoRA tensors in all layouts (diffusers, PEFT, kohya), and module names in the two spellings of kohya."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

#: Part of a diffusers pipeline -> how kohya's names begin that belong to it, the usual one first.
KOHYA_PREFIXES = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}

#: What a LoRA file may hold besides low-rank factors -> how its tensors are called.
UNSUPPORTED = {
    "DoRA": re.compile(r"\.dora_scale$|\.lora_magnitude_vector\b"),
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoKr": re.compile(r"\.lokr_\w+(\.weight)?$"),
    "OFT": re.compile(r"\.oft_\w+(\.weight)?$"),
    "full-difference": re.compile(r"\.diff(_b)?$|\.[wb]_norm$|\.set_weight$"),
    "LoRA bias": re.compile(r"\.lora_(B|up)(\.[^.]+)?\.bias$"),
}

_COMFY = "diffusion_model."  # how ComfyUI begins the names of LoRAs that it extracts, original-format ones
_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up", "mid": "mid"}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<role>A|B|down|up|mid)(\.[^.]+)?\.weight")
_PROCESSOR = re.compile(r"(?P<module>.+)\.(?P<leaf>to_q|to_k|to_v|to_out)_lora\.(?P<role>down|up)\.weight")
_OLD = re.compile(r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<role>down|up)\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")

# The words that module names of UNets (diffusers' and the original ones) and of CLIP consist of; each one is kept
# whole where underscores become dots. Longer words stand before their beginnings.
_WORDS = (
    "down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks|transformer_blocks|resnets|attentions|"
    "downsamplers|upsamplers|attn1|attn2|to_q|to_k|to_v|to_out|ff|net|proj_in|proj_out|proj|conv_shortcut|conv_in|"
    "conv_out|conv1|conv2|conv|time_emb_proj|time_embedding|time_embed|add_embedding|class_embedding|label_emb|"
    "cond_proj|linear_1|linear_2|linear|in_layers|out_layers|emb_layers|skip_connection|op|out|"
    "text_model|text_projection|encoder|layers|self_attn|q_proj|k_proj|v_proj|out_proj|mlp|fc1|fc2"
)
_WORD = re.compile(rf"({_WORDS}|\d+)(?:_|$)")

_TOP = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_TOP_BACK = {new: old for old, new in _TOP.items()}
_RESNET_BACK = {new: old for old, new in _RESNET.items()}
_KINDS = ("resnets", "attentions")


@dataclass(frozen=True)
class LoraName:
    """What one tensor of a LoRA is: `component` of the pipeline, dotted `module`, `role` (down, up, mid or alpha).

    `prefix` is kohya's beginning of the name ("" in other layouts); `original` whether the module was spelled as in
    original-format checkpoints.
    """

    component: str
    module: str
    role: str
    prefix: str = ""
    original: bool = False


def parse(name: str, modules: Mapping[str, str] | None = None) -> LoraName | None:
    """What the tensor `name` of a LoRA is, or None if no known layout calls a factor or an alpha so.

    `modules` maps a module name with underscores for dots to the module's name, for the model at hand; what it does
    not know is split by the grammar of UNet and CLIP modules.
    """
    name = name.replace("_orig_mod.", "").removeprefix("base_model.model.")
    for pattern in (_FACTOR, _PROCESSOR, _OLD, _ALPHA):
        if match := pattern.fullmatch(name):
            break
    else:
        return None
    found = match.groupdict()
    module, role = found["module"], _ROLES.get(found.get("role", ""), "alpha")
    if "leaf" in found:
        module += ".to_out.0" if found["leaf"] == "to_out" else f".{found['leaf']}"
    for component, prefixes in KOHYA_PREFIXES.items():
        for prefix in prefixes:
            if module.startswith(prefix):
                return _parse_kohya(component, prefix, module.removeprefix(prefix), role, modules or {})
    if module.startswith(_COMFY):
        plain = from_original(module.removeprefix(_COMFY))
        return LoraName("unet", plain or module.removeprefix(_COMFY), role, original=plain is not None)
    component, dot, rest = module.partition(".")
    if not dot or component not in KOHYA_PREFIXES:
        component, rest = "unet", module
    if component != "unet":
        rest = re.sub(r"\.to_([qkv])$", r".\1_proj", rest).replace(".to_out.0", ".out_proj")
    return LoraName(component, rest.replace(".processor", "").replace(".base_layer", ""), role)


def _parse_kohya(component: str, prefix: str, flat: str, role: str, modules: Mapping[str, str]) -> LoraName | None:
    if component == "unet" and flat in modules:
        return LoraName(component, modules[flat], role, prefix)
    module = dotted(flat)
    if module is None:
        return None
    plain = from_original(module) if component == "unet" else None
    return LoraName(component, plain or module, role, prefix, plain is not None)


def flat_names(weights: Iterable[str]) -> dict[str, str]:
    """`{module name with underscores: module name}` of all weights of a model; names that collide are left out."""
    modules = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    found: dict[str, str] = {}
    for module in modules:
        flat = module.replace(".", "_")
        found[flat] = "" if flat in found else module
    return {flat: module for flat, module in found.items() if module}


def dotted(flat: str) -> str | None:
    """`mid_block_attentions_0_proj_in` -> `mid_block.attentions.0.proj_in`; None if a part is no known word.

    The words are those of UNets and CLIP: no list of models is needed, and none of their modules is ambiguous.
    """
    words, position = [], 0
    while position < len(flat):
        match = _WORD.match(flat, position)
        if match is None:
            return None
        words.append(match[1])
        position = match.end()
    return ".".join(words) or None


def from_original(module: str) -> str | None:
    """diffusers' name of a UNet module that is spelled as in original-format checkpoints (two layers a block)."""
    if module in _TOP:
        return _TOP[module]
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.(\d+))?\.(.+)", module)
    if match is None:
        return None
    part, index, rest = match[1], int(match[2]), match[4]
    if part == "middle_block":
        kind, layer, tail = _KINDS[index % 2], index // 2, module.split(".", 2)[2]
        return f"mid_block.{kind}.{layer}.{_RESNET.get(tail, tail)}"
    if match[3] is None:
        return None
    kind_index = int(match[3])
    block, layer = divmod(index - 1 if part == "input_blocks" else index, 3)
    side = "down" if part == "input_blocks" else "up"
    if rest in ("op", "conv"):
        return f"{side}_blocks.{block}.{side}samplers.0.conv"
    if kind_index >= len(_KINDS):
        return None
    return f"{side}_blocks.{block}.{_KINDS[kind_index]}.{layer}.{_RESNET.get(rest, rest)}"


def to_original(module: str) -> str | None:
    """The inverse of `from_original` for SDXL, whose blocks with an upsampler all have attention; None if unknown."""
    if module in _TOP_BACK:
        return _TOP_BACK[module]
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    if match is not None:
        side, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{3 * block + 3}.0.op"
        if kind == "upsamplers":
            return f"output_blocks.{3 * block + 2}.2.conv"
        index = 3 * block + layer + (1 if side == "down" else 0)
        name = "input_blocks" if side == "down" else "output_blocks"
        return f"{name}.{index}.{_KINDS.index(kind)}.{_RESNET_BACK.get(rest, rest)}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if match is None:
        return None
    return f"middle_block.{2 * int(match[2]) + _KINDS.index(match[1])}.{_RESNET_BACK.get(match[3], match[3])}"
