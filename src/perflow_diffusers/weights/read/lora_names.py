"""Names of LoRA tensors in all layouts (diffusers, PEFT, kohya, ComfyUI) -> component, module, role."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from perflow_diffusers.families import ANY_COMPONENTS, NETWORKS, TRANSFORMER_PREFIXES
from perflow_diffusers.weights.read.original_names import SDXL, Blocks, from_original, to_original

__all__ = [
    "BUNDLED",
    "KIN_ROLES",
    "KOHYA_PREFIXES",
    "UNNAMED_TEXT",
    "UNSUPPORTED",
    "LoraName",
    "dotted",
    "flat_names",
    "from_original",
    "original_module",
    "other_model",
    "parse",
    "spelled",
    "to_original",
]

#: Part of a diffusers pipeline -> how kohya's names begin that belong to it, the usual one first.
KOHYA_PREFIXES = {
    **{network.component: network.kohya_prefixes for network in NETWORKS},
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}

#: How names of textual inversions begin that are bundled with a LoRA: no layers of it.
BUNDLED = "bundle_emb."

#: What a LoRA file may hold that is no change of a weight which could be computed -> how its tensors are called.
UNSUPPORTED = {
    "OFT": re.compile(r"\.oft_\w+(\.[^.]+)?(\.weight)?$"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$|\.glora_\w+(\.[^.]+)?$"),
    "IA3": re.compile(r"\.on_input$|\.ia3_l(\.[^.]+)?$"),
    "whole-weight": re.compile(r"\.(set|reshape)_weight$"),
}

#: Roles of tensors that are computed in a merge and are no low-rank pair -> the kind they belong to.
KIN_ROLES = {
    **{f"hada_{part}": "LoHa" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": "LoKr" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")},
    "dora_scale": "DoRA",
    "diff": "full-difference",
    "diff_b": "full-difference",
    "lora_bias": "LoRA bias",
}

_COMFY = {  # how ComfyUI begins the names of LoRAs that it extracts; those of the UNet are original-format ones
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
_ROLES = {"A": "down", "down": "down", "B": "up", "up": "up", "mid": "mid"}
_ROLES |= {"w_norm": "diff", "b_norm": "diff_b", "lora_magnitude_vector": "dora_scale"}
_ROLES |= {"lora_B": "lora_bias", "lora_up": "lora_bias"}
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<role>A|B|down|up|mid)(\.[^.]+)?\.weight")
_PROCESSOR = re.compile(r"(?P<module>.+)\.(?P<leaf>to_q|to_k|to_v|to_out)_lora\.(?P<role>down|up)\.weight")
_OLD = re.compile(r"(?P<module>.+)\.lora(_linear_layer)?\.(?P<role>down|up)\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_KIN = re.compile(
    r"(?P<module>.+)\.(?P<role>hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|dora_scale|lora_magnitude_vector)"
    r"(\.[^.]+)?(\.weight)?"
)
_DIFFERENCE = re.compile(r"(?P<module>.+)\.(?P<role>diff|diff_b|w_norm|b_norm)")
_BIAS = re.compile(r"(?P<module>.+)\.(?P<role>lora_B|lora_up)(\.[^.]+)?\.bias")

# The words that module names of our networks and of CLIP consist of; each one is kept whole where underscores become
# dots.
_CLIP = ("text_model", "text_projection", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj")
_WORDS = {word for network in NETWORKS for word in network.words} | {*_CLIP, "mlp", "fc1", "fc2"}
# Longer words first: no word is taken for its own beginning (out for out_proj).
_WORD = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))}|\d+)(?:_|$)")

# A name that says of no component whose it is must begin as the names of our networks do.
_ROOTS = "|".join(root for network in NETWORKS for root in network.roots)
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks|out|time_embed|label_emb)\.")
_ROOT = re.compile(rf"({_ROOTS})(\.|$)")

#: A text encoder's LoRA as PEFT saves it: nothing says which one of a pipeline it is for.
UNNAMED_TEXT = "a text encoder without the name of its place in a pipeline"

#: Models that are no UNet of Stable Diffusion and none of its text encoders -> how names of their LoRAs begin.
_OTHERS = {
    "a third text encoder (SD 3)": r"text_encoder_[3-9]\.|lora_te[3-9]_|text_encoders\.t5",
    UNNAMED_TEXT: r"(text_model|text_projection|encoder\.layers)\b",
    "a prior (Kandinsky, Stable Cascade)": r"prior\w*\.|decoder\.|lora_prior_",
    "a ControlNet or T2I adapter": r"(controlnet|control_model|adapter)\w*\.|lora_controlnet|lllite_",
    "a transformer (Flux, SD 3, Wan and others)": (
        r"(transformer|dit|diffusion_model)\w*\.|lora_(transformer|dit)\w*_|"
        r"(lora_unet_)?((double|single|joint)\w*_)?(transformer_)?(blocks|layers)[._]\d|"
        r"(lora_unet_)?(double|single|joint|img|txt|context_embedder|x_embedder|final_layer|time_text_embed|"
        r"guidance_in|vector_in)"
    ),
    "a language model": r"(model|language_model)\.",
}


@dataclass(frozen=True)
class LoraName:
    """What one tensor of a LoRA is: `component` of the pipeline, dotted `module`, `role` (down, up, mid, alpha, or
    one of `KIN_ROLES`).

    `module` is spelled as PEFT's patterns for this file know it; see `spelled`. `prefix` is kohya's beginning of the
    name ("" in other layouts); `original` whether the module was spelled as in original-format checkpoints.
    """

    component: str
    module: str
    role: str
    prefix: str = ""
    original: bool = False

    @property
    def place(self) -> tuple[str, str]:
        """Component and module, the same for every spelling: text encoders without a leading `text_model.`."""
        module = self.module if self.component == "unet" else self.module.removeprefix("text_model.")
        return self.component, module


def spelled(component: str, module: str) -> str:
    """How the layer at a place is called in the diffusers layout, its component included.

    Text encoders get the `text_model.` of transformers before 5.0, which diffusers removes where the model has none:
    so the name fits with every version of it.
    """
    inner = "text_model." if component not in ANY_COMPONENTS and module.startswith("encoder.") else ""
    return f"{component}.{inner}{module}"


def parse(name: str, modules: Mapping[str, str] | None = None, blocks: Blocks = SDXL) -> LoraName | None:
    """What the tensor `name` of a LoRA is, or None if no known layout calls a factor or an alpha of these models so.

    `modules` maps a module name with underscores for dots to the module's name, for the model at hand; what it does
    not know is split by the grammar of UNet and CLIP modules; a transformer's are known from the model alone. `blocks`
    are those that original-format names count.
    """
    found, known = _split(name), modules or {}
    if found is None:
        return None
    if found.prefix:
        if found.component == "unet" and found.module in known:
            return replace(found, module=known[found.module])
        module = dotted(found.module)
        if module is None:
            return None
        found = replace(found, module=module)
    if found.component != "unet":
        return found
    if (module := _of_transformer(found.module, known)) is not None:
        return replace(found, module=module)
    if _ORIGINAL.match(found.module):
        module = from_original(found.module, blocks)
        return None if module is None else replace(found, module=module, original=True)
    named = name.startswith("unet.") or _ROOT.match(found.module) or found.module in known.values()
    return found if named else None


def _of_transformer(module: str, known: Mapping[str, str]) -> str | None:
    """The module of the model at hand that a name for a transformer's LoRA means, dotted or with underscores."""
    for prefix in TRANSFORMER_PREFIXES:
        rest = module.removeprefix(prefix)
        if rest != module:
            return known.get(rest) or known.get(rest.replace(".", "_"))
    return None


def original_module(name: str) -> tuple[str, str] | None:
    """(module, role) of a LoRA's tensor if the module is spelled as in original-format checkpoints, else None."""
    found = _split(name)
    module = found and (dotted(found.module) if found.prefix else found.module)
    return (module, found.role) if found and module and _ORIGINAL.match(module) else None


def other_model(names: Iterable[str]) -> tuple[str, list[str]] | None:
    """What other model the LoRA is for to which names of its tensors belong, in words, and those names."""
    names = [name.replace("_orig_mod.", "").removeprefix("base_model.model.") for name in names]
    for what, pattern in _OTHERS.items():
        if found := [name for name in names if re.match(pattern, name)]:
            return what, found
    return None


def _split(name: str) -> LoraName | None:
    """Component, prefix, module (as it is written) and role; None if no layout calls a factor or an alpha so."""
    name = name.replace("_orig_mod.", "").removeprefix("base_model.model.")
    for pattern in (_FACTOR, _PROCESSOR, _OLD, _ALPHA, _KIN, _DIFFERENCE, _BIAS):
        if match := pattern.fullmatch(name):
            break
    else:
        return None
    found = match.groupdict()
    module, role = found["module"], _ROLES.get(found.get("role", "alpha"), found.get("role", "alpha"))
    if "leaf" in found:
        module += ".to_out.0" if found["leaf"] == "to_out" else f".{found['leaf']}"
    for component, prefixes in KOHYA_PREFIXES.items():
        for prefix in prefixes:
            if module.startswith(prefix):
                return LoraName(component, module.removeprefix(prefix), role, prefix)
    for start, component in _COMFY.items():
        if module.startswith(start):
            return LoraName(component, module.removeprefix(start), role)
    component, dot, rest = module.partition(".")
    if not dot or component not in KOHYA_PREFIXES:
        component, rest = "unet", module
    if component == "unet":
        rest = rest.replace(".temporal_transformer.", ".")  # motion LoRAs of AnimateDiff's authors
        rest = re.sub(r"\.attention_blocks\.([01])\b", lambda match: f".attn{int(match[1]) + 1}", rest)
    else:
        rest = re.sub(r"\.to_([qkv])$", r".\1_proj", rest).replace(".to_out.0", ".out_proj")
    return LoraName(component, rest.replace(".processor", "").replace(".base_layer", ""), role)


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
