"""The trained student, one weight at a time: the base's own weights, replaced, or with a LoRA's product added."""

import json
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor

from perflow_diffusers.weights import WeightSource
from perflow_diffusers.weights.read.lora import as_delta
from perflow_diffusers.weights.read.lora_layers import ADAPTER_METADATA, adapter_metadata
from perflow_training.config import TrainingConfig


def student_weights(
    config: TrainingConfig, base: WeightSource, trained: WeightSource, component: str = "unet"
) -> WeightSource:
    """All weights of the student in float32 by canonical name, of the `trained` ones by name and the teacher's.

    W + B A alpha / rank where a LoRA was trained, else the trained weights themselves, and the base's where none was.
    """
    change = as_delta(trained_lora(config, trained, component), base.shapes) if config.lora_rank else None

    def read(name: str) -> Tensor:
        if change is None:
            return (trained if name in trained else base)[name]
        return base[name] + change[name] if name in change else base[name]

    return replace(base, name="the student", read=read, metadata={})


def trained_lora(config: TrainingConfig, trained: WeightSource, component: str = "unet") -> WeightSource:
    """The LoRA's factors under the names that diffusers stores for `component`, with the config that says alpha."""
    names = {f"{component}.{name.replace('.default.', '.')}": name for name in trained}
    shapes = {name: trained.shapes[own] for name, own in names.items()}
    alpha = config.lora_alpha or config.lora_rank
    modules = {
        name.removeprefix(f"{component}.").removesuffix(".lora_A.weight"): (shape[0], alpha)
        for name, shape in shapes.items()
        if name.endswith(".lora_A.weight")
    }
    return WeightSource(
        "the trained LoRA",
        MappingProxyType(shapes),
        MappingProxyType({name: trained.dtypes[own] for name, own in names.items()}),
        lambda name: trained[names[name]],
        {ADAPTER_METADATA: json.dumps(adapter_metadata(modules, component))},
    )
