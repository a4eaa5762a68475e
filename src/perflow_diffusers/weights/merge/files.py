"""Merge from file to file, tensor by tensor, where no pipeline is at hand: `merge_files(base, delta, out)`."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from perflow_diffusers.io.writer import (
    INDEX_NAME,
    Spec,
    check_folder_name,
    check_target,
    drop_shards,
    make_folder,
    write_safetensors,
    write_text,
)
from perflow_diffusers.weights.merge.edits import Layer
from perflow_diffusers.weights.merge.plan import ConvIn, check_addable, plan_weights
from perflow_diffusers.weights.merge.sums import Kept, check_sums, sample, terms_of, write_weight
from perflow_diffusers.weights.read.named import named_weights
from perflow_diffusers.weights.read.unet_config import config_beside
from perflow_diffusers.weights.scales import Scale, Strength, strength_of
from perflow_diffusers.words.arguments import path_of
from perflow_diffusers.words.shown import shown

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@shown
@dataclass(frozen=True)
class FileMergeReport:
    """What a merge to a file did, or would do; `changed`, `untouched` count weights, `nbytes` is their size.

    `kept` is the share of scale x delta that the weights' dtype kept, as in `MergeReport`; None of a dry run.
    """

    base: str
    delta: str
    scale: Scale
    changed: int
    untouched: int
    nbytes: int
    out: str
    kept: float | None = None

    def __str__(self) -> str:
        kept = "" if self.kept is None or self.kept > 0.99 else f" ({100 * self.kept:.0f} % kept by their dtype)"
        return (
            f"{self.base} + {Strength(self.scale)} x {self.delta}: {self.changed} weights changed{kept}, "
            f"{self.untouched} as they were, {self.nbytes / 1e6:.1f} MB: {self.out}"
        )


def merge_files(
    base: Any,
    delta: Any,
    out: str | os.PathLike,
    *,
    scale: Scale = 1.0,
    conv_in: ConvIn = "pad",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FileMergeReport:
    """Write base + scale * delta, each weight rounded once to the dtype that it has in `base`.

    `base` is any complete UNet that `open_weights` takes, original-format files included; `delta`, `scale` and
    `conv_in` are what `merge_delta` takes. `out` is a `.safetensors` file, or a folder that
    `UNet2DConditionModel.from_pretrained` loads (then `base` must have its UNet's config beside its weights). Memory:
    a few tensors. `dry_run` checks and writes nothing; `progress(done, total)` is called after each tensor.

    Raises `MergeError`, `WeightSourceError` or `WeightWriteError` (all ValueErrors), before anything is written; also
    for a sum that overflows. Warns if the weights' dtype keeps less than half of the change.
    """
    target = path_of(out, "out", 'merge_files(base, delta, "merged.safetensors")')
    model, names = named_weights(base)
    weights = {name: model[key].detach() for name, key in names.items()}
    check_addable(weights)
    strength = strength_of(scale, weights)
    plan = plan_weights(weights, delta, conv_in=conv_in)
    layer = Layer(0, plan, strength)
    check_sums([layer], {}, weights, plan.edit_of)
    if target.suffix != ".safetensors":
        check_folder_name(target)
    config = None if target.suffix == ".safetensors" else config_beside(model, weights)
    file = target if config is None else target / WEIGHTS_NAME
    specs: dict[str, Spec] = {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    nbytes = sum(weight.numel() * weight.element_size() for weight in weights.values())
    report = FileMergeReport(
        model.name, plan.source.name, strength.given, len(plan.edits), len(plan.untouched), nbytes, str(target)
    )
    if dry_run:
        return report
    if config is not None:
        make_folder(target)
        for other in (target / INDEX_NAME, target / "config.json"):
            check_target(other, 0, overwrite=overwrite)
    check_target(file, nbytes, overwrite=overwrite)
    kept = Kept()
    tensors = _merged(weights, layer, kept, progress)
    write_safetensors(file, specs, tensors, {"format": "pt"}, overwrite=overwrite)
    if config is not None:
        write_text(target / "config.json", json.dumps(config, indent=2) + "\n", overwrite=True)
        drop_shards(target)  # diffusers would go on loading the shards of an old model beside the new file
    kept.warn(f"{plan.source.name} x {strength}", {weights[edit.name].dtype for edit in plan.edits})
    return replace(report, kept=kept.share)


def _merged(
    weights: dict[str, torch.Tensor], layer: Layer, kept: Kept, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weight by weight, each to be written before the next: the sums share one buffer, which leaves no gaps behind."""
    longest: dict[tuple[torch.dtype, torch.device], int] = {}
    for name in layer.plan.edit_of:
        kind = weights[name].dtype, weights[name].device
        longest[kind] = max(longest.get(kind, 0), weights[name].numel())
    buffers = {kind: torch.empty(count, dtype=kind[0], device=kind[1]) for kind, count in longest.items()}
    for done, (name, weight) in enumerate(weights.items(), start=1):
        if name in layer.plan.edit_of:
            merged = buffers[weight.dtype, weight.device][: weight.numel()].view(weight.shape)
            terms = list(terms_of([layer], name, weight, weight.device))
            write_weight(merged, weight, terms)
            kept.add(merged, sample(weight), terms)
            weight = merged
        yield name, weight
        if progress is not None:
            progress(done, len(weights))
