"""A LoRA in the layout of diffusers, with the residual beside it: where it goes, and how it is written."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.families import component_of
from perflow_diffusers.io.tensors import dtype_name, dtype_names
from perflow_diffusers.io.writer import (
    File,
    Spec,
    check_folder_name,
    check_target,
    make_folder,
    specs_of,
    write_together,
)
from perflow_diffusers.weights.read.header_facts import KOHYA_CONFIG, KOHYA_SPELLING, for_new_tensors
from perflow_diffusers.weights.read.lora import ADAPTER_METADATA, RESIDUAL_KEY, adapter_metadata
from perflow_diffusers.weights.read.lora_names import KOHYA_PREFIXES, spelled
from perflow_diffusers.words.arguments import path_of
from perflow_diffusers.words.shown import shown

LORA_FORMAT = "lora-1"
RESIDUAL_FORMAT = "delta-residual-1"
LORA_NAME = "pytorch_lora_weights.safetensors"
ORDER = 'extract_lora(delta, "lora.safetensors", rank=64)'
#: What LoRAs are stored in.
STORED = (torch.float16, torch.bfloat16, torch.float32)
#: Keys of a header that say how its own tensors are stored.
OWN_KEYS = (
    "format",
    "perflow_format",
    "dtype",
    "identical",
    ADAPTER_METADATA,
    RESIDUAL_KEY,
    KOHYA_CONFIG,
    KOHYA_SPELLING,
)


def lora_targets(out: str | os.PathLike, residual: bool, overwrite: bool, *, make: bool = True) -> tuple[Path, Path]:
    """Files of a LoRA and its residual; what would prevent writing them is told before the work begins.

    A folder is made if need be, unless `make` is False.
    """
    path = path_of(out, "out", ORDER)
    if path.suffix != ".safetensors":
        if path.is_file():
            raise DeltaError(f"{path} is a file. Pass a folder, or a name that ends in .safetensors.")
        check_folder_name(path)
        if make:
            make_folder(path)
        path = path / LORA_NAME
    rest_path = path.with_suffix(".residual.safetensors")
    for target in (path, rest_path) if residual else (path,):
        if make or target.parent.is_dir():
            check_target(target, 0, overwrite=overwrite)
    return path, rest_path


@shown
@dataclass(frozen=True, eq=False)
class Factors:
    """One layer of a LoRA as it is stored: A (r, ...) and B (out, r), with the alpha that both are made for."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float


def write_lora(
    path: Path,
    rest_path: Path,
    layers: Mapping[str, Factors],
    rest: Mapping[str, Spec],
    rest_tensors: Iterable[tuple[str, torch.Tensor]],
    said: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    """Layers by the names of their weights as a LoRA, and tensors that no LoRA can carry as its residual.

    `said` is the header of what they were made of. The residual comes first: a LoRA that names one is never without.
    """
    tensors: dict[str, torch.Tensor] = {}
    strengths: dict[str, dict[str, tuple[int, float]]] = {}
    network = component_of(layers)
    for name, layer in layers.items():
        component, module = _place(name, network)
        stem = spelled(component, module)
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = layer.down, layer.up
        strengths.setdefault(component, {})[module] = (len(layer.down), layer.alpha)
    taken = for_new_tensors(said, OWN_KEYS)
    stored = next(iter(tensors.values())).dtype
    header = {**taken, "format": "pt", "perflow_format": LORA_FORMAT, "dtype": dtype_name(stored)}
    config: dict[str, Any] = {}
    for component, own in strengths.items():
        config |= adapter_metadata(own, component)
    header[ADAPTER_METADATA] = json.dumps(config, indent=2, sort_keys=True)
    files = []
    if rest:
        dtypes = dtype_names(dtype for _, dtype in rest.values())
        rest_header = {**taken, "format": "pt", "perflow_format": RESIDUAL_FORMAT, "dtype": dtypes}
        files.append(File(rest_path, rest, rest_tensors, rest_header))
        header[RESIDUAL_KEY] = rest_path.name
    files.append(File(path, specs_of(tensors), tensors.items(), header))
    write_together(files, overwrite=overwrite, former=(rest_path,))


def _place(name: str, network: str) -> tuple[str, str]:
    """Component and module of a weight, of the `network` if of no text encoder: see `lora.weight_name`."""
    component, _, module = name.removesuffix(".weight").partition(".")
    return (component, module) if component in KOHYA_PREFIXES else (network, name.removesuffix(".weight"))
