"""Weights that are read one at a time and kept no longer than they are used."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from perflow_diffusers.weights import WeightSource, open_weights


def read_afresh(file_or_source: Path | WeightSource) -> WeightSource:
    """The weights of safetensors files, which are opened for each tensor: nothing that was read stays mapped."""
    source = open_weights(file_or_source)
    home: dict[str, Path] = {}
    for path in source.files:
        with safe_open(path, framework="pt", device="cpu") as file:
            home |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        with safe_open(home[name], framework="pt", device="cpu") as file:
            return file.get_tensor(name)

    return replace(source, read=read) if source.files else source


def as_source(weights: Mapping[str, Tensor], name: str) -> WeightSource:
    """Tensors by name, of memory or of files, under a name for people."""
    return replace(open_weights(weights), name=name)
