"""A delta as ComfyUI's LoRA loader reads whole differences: `delta_for_comfy(delta, out)`.

W_new = W + strength * diff for weights, b_new = b + strength * diff_b for biases.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.io.writer import Spec, write_safetensors
from perflow_diffusers.weights.make.shrink import checked_delta
from perflow_diffusers.weights.read import keys
from perflow_diffusers.weights.read.complete import check_difference
from perflow_diffusers.weights.read.header_facts import OF_BYTES
from perflow_diffusers.weights.read.lora import as_delta
from perflow_diffusers.weights.read.named import canonical_names
from perflow_diffusers.weights.read.source import WeightSource, open_weights
from perflow_diffusers.words.arguments import path_of

# The modules that ComfyUI's map from diffusers' names to its own knows (`unet_to_diffusers`); it has the counts of
# blocks from the model that is loaded there, so these names fit pruned models, too.
_RESNET = r"resnets\.\d+\.(norm1|conv1|time_emb_proj|norm2|conv2|conv_shortcut)"
_ATTENTION = (
    r"attentions\.\d+\.(norm|proj_in|proj_out|transformer_blocks\.\d+\."
    r"(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
)
_KNOWN = re.compile(
    rf"(down_blocks|up_blocks)\.\d+\.({_RESNET}|{_ATTENTION}|(down|up)samplers\.0\.conv)"
    rf"|mid_block\.({_RESNET}|{_ATTENTION})"
    r"|conv_in|conv_norm_out|conv_out|(time|add|class)_embedding\.linear_[12]"
)
_SUFFIXES = {"weight": "diff", "bias": "diff_b"}
_TIED_TO_FORM = ("perflow_format", "dtype", *OF_BYTES)  # what a header says of the tensors that are no longer there


def delta_for_comfy(
    delta: Any,
    out: str | os.PathLike,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a delta for ComfyUI's stock LoRA loader: every number of it, norms and biases included, at any strength.

    `delta` is a delta in any form that `open_weights` takes, `out` a `.safetensors` file for ComfyUI's `models/loras`.
    A tensor `<module>.weight` becomes `lora_unet_<module with underscores>.diff`, a bias `.diff_b`, in the dtype that
    it has (int8 in fp32). `merge_delta` reads the file, too. `progress(done, total)` is called after each tensor.

    Raises `DeltaError` for a LoRA (write its kohya layout), complete weights, and for tensors that ComfyUI's loader
    would leave out; `WeightWriteError` for an `out` that cannot be written. An old file there is then intact.
    """
    target = path_of(out, "out", 'delta_for_comfy(delta, "comfy.safetensors")')
    source, names = _named(delta)
    specs: dict[str, Spec] = {new: (source.shapes[key], source.dtypes[key]) for new, key in names.items()}
    header = {"format": "pt"} | {name: value for name, value in source.metadata.items() if name not in _TIED_TO_FORM}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for done, (new, key) in enumerate(names.items(), start=1):
            yield new, source[key]
            if progress is not None:
                progress(done, len(names))

    return write_safetensors(target, specs, stream(), header, overwrite=overwrite)


def check_comfy(delta: Any) -> str:
    """One sentence on what `delta_for_comfy(delta, out)` would write; reads a few tensors. Raises what it can see."""
    source, names = _named(delta)
    return f"{source.name} for ComfyUI's LoRA loader: {len(names)} tensors, {source.nbytes / 1e6:.2f} MB"


def _named(delta: Any) -> tuple[WeightSource, dict[str, str]]:
    """The delta, and the key of each tensor by the name that it gets."""
    given = open_weights(delta)
    if given.kind == "lora":
        raise DeltaError(
            f"{given.name} is a LoRA already. ComfyUI reads low-rank pairs in the kohya layout (`convert_lora(source, "
            'out, "kohya")`), and LoHa, LoKr, DoRA and differences as they are.'
        )
    source = as_delta(checked_delta(given))
    plain = canonical_names(source)
    check_difference(source, plain)
    wrong = [name for name in plain if _comfy_name(name) is None or not source.dtypes[plain[name]].is_floating_point]
    if wrong:
        raise DeltaError(
            f"{len(wrong)} tensors of {source.name} are nothing that ComfyUI's LoRA loader would add: "
            f"{keys.grouped(wrong)}. Its names are those of the UNets of SD 1.x, 2.x and SDXL. Merge the delta with "
            "`merge_files` instead, and load the result as a model there."
        )
    return source, {str(_comfy_name(name)): key for name, key in plain.items()}


def _comfy_name(name: str) -> str | None:
    """`conv_in.weight` -> `lora_unet_conv_in.diff`; None if ComfyUI's map has no such module."""
    module, _, parameter = name.rpartition(".")
    if parameter not in _SUFFIXES or _KNOWN.fullmatch(module) is None:
        return None
    return f"lora_unet_{module.replace('.', '_')}.{_SUFFIXES[parameter]}"
