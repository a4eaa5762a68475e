"""Merge from file to file, tensor by tensor, where no pipeline is at hand: `merge_files(base, delta, out)`."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.weights.delta import named_weights
from perflow_diffusers.weights.plan import ConvIn, MergePlan, check_addable, checked_scale, plan_weights
from perflow_diffusers.weights.stack import write_weight
from perflow_diffusers.weights.unet_config import config_beside
from perflow_diffusers.weights.writer import (
    INDEX_NAME,
    Spec,
    check_target,
    drop_shards,
    make_folder,
    write_safetensors,
    write_text,
)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class FileMergeReport:
    """What a merge to a file did, or would do; `changed`, `untouched` count weights, `nbytes` is their size."""

    base: str
    delta: str
    scale: float
    changed: int
    untouched: int
    nbytes: int
    out: str

    def __str__(self) -> str:
        return (
            f"{self.base} + {self.scale:g} x {self.delta}: {self.changed} weights changed, {self.untouched} as they "
            f"were, {self.nbytes / 1e6:.1f} MB: {self.out}"
        )


def merge_files(
    base: Any,
    delta: Any,
    out: str | os.PathLike,
    *,
    scale: float = 1.0,
    conv_in: ConvIn = "pad",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FileMergeReport:
    """Write base + scale * delta, each weight rounded once to the dtype that it has in `base`.

    `base` is any complete UNet that `open_weights` takes, original-format files included, `delta` anything that
    `merge_delta` takes. `out` is a `.safetensors` file, or a folder that `UNet2DConditionModel.from_pretrained` loads
    (then `base` must have its UNet's config beside its weights). Memory: a few tensors. `dry_run` checks and writes
    nothing.

    Raises `MergeError`, `WeightSourceError` or `WeightWriteError` (all ValueErrors), before anything is written.
    """
    scale = checked_scale(scale)
    model, names = named_weights(base)
    weights = {name: model[key].detach() for name, key in names.items()}
    check_addable(weights)
    plan = plan_weights(weights, delta, scale=scale, conv_in=conv_in)
    target = Path(out)
    config = None if target.suffix == ".safetensors" else config_beside(model, weights)
    file = target if config is None else target / WEIGHTS_NAME
    specs: dict[str, Spec] = {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    nbytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
    report = FileMergeReport(
        model.name, plan.source.name, scale, len(plan.edits), len(plan.untouched), nbytes, str(target)
    )
    if dry_run:
        return report
    if config is not None:
        make_folder(target)
        for other in (target / INDEX_NAME, target / "config.json"):
            check_target(other, 0, overwrite=overwrite)
    check_target(file, nbytes, overwrite=overwrite)
    write_safetensors(file, specs, _merged(weights, plan, scale, progress), {"format": "pt"}, overwrite=overwrite)
    if config is not None:
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n", overwrite=True)
        drop_shards(target)  # diffusers would go on loading the shards of an old model beside the new file
    return report


def _merged(
    weights: dict[str, torch.Tensor], plan: MergePlan, scale: float, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for done, (name, weight) in enumerate(weights.items(), start=1):
        edit = plan.edit_of.get(name)
        if edit is not None:
            merged = torch.empty_like(weight)
            write_weight(merged, weight, [(scale, plan.source.near(edit.key, weight.device, weight), edit.channels)])
            weight = merged
        yield name, weight
        if progress is not None:
            progress(done, len(weights))
