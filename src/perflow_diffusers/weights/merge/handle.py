"""Put deltas into a UNet and take them out to the last bit: `merge_delta`, `unmerge_delta`, `set_delta_scale`."""

import copy
import time
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any, get_args

import torch

from perflow_diffusers.errors import MergeError
from perflow_diffusers.weights.merge.edits import Edit, Layer, MergePlan
from perflow_diffusers.weights.merge.layers import (
    Backup,
    MergeStack,
    acting_plans,
    add_permanently,
    check_unchanged,
    drop_unused,
    save_bits,
    stack_of,
    write_layers,
)
from perflow_diffusers.weights.merge.plan import ConvIn, plan_merge, plan_weights, usable_weights
from perflow_diffusers.weights.merge.report import MergeReport
from perflow_diffusers.weights.merge.sums import Kept, check_sums
from perflow_diffusers.weights.merge.undo import check_mergeable, rescale, rescale_merge, undo_last, undo_merge
from perflow_diffusers.weights.merge.within import WITHIN, base_sample, share_within
from perflow_diffusers.weights.read.live import find_network
from perflow_diffusers.weights.read.source import WeightSource
from perflow_diffusers.weights.scales import Scale, Strength, strength_of
from perflow_diffusers.words.notices import warn_user
from perflow_diffusers.words.shown import folded

__all__ = [
    "Edit",
    "MergeError",
    "MergeHandle",
    "MergePlan",
    "MergeReport",
    "merge_delta",
    "plan_merge",
    "set_delta_scale",
    "unmerge_delta",
]


class MergeHandle:
    """A merge that was done: says what (`report`, `metadata`) and takes it back (`undo`, or the end of a `with`).

    `plan` is what was checked, `metadata` the header of the delta (str -> str: prediction_type, steps, ...),
    `backup` where the base bits are ("cpu", "disk", "none"), `number` tells it from other merges on its UNet. A deep
    copy acts on the copy of the UNet that is made with it, a pickled one on none: a pickle keeps no base bits.
    """

    def __init__(self, unet: torch.nn.Module | None, number: int | None, plan: MergePlan, report: MergeReport) -> None:
        self._unet = _no_unet if unet is None else weakref.ref(unet)
        self.number = number
        self.plan = plan
        self.report = report
        self.backup = report.backup

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the delta's header says, str -> str."""
        return self.plan.source.metadata

    @property
    def active(self) -> bool:
        """Whether the merge is in the weights and can be undone."""
        unet = self._unet()
        return unet is not None and any(layer.number == self.number for layer in stack_of(unet).layers)

    @property
    def scale(self) -> Scale:
        """The present scale, as it was given; 0 after `undo`."""
        unet = self._unet()
        layers = stack_of(unet).layers if unet is not None else []
        default = self.report.scale if self.number is None else 0.0
        return next((layer.strength.given for layer in layers if layer.number == self.number), default)

    def undo(self, *, force: bool = False) -> None:
        """Take this merge out; the last one on the UNet must go first. `force` and errors as in `unmerge_delta`."""
        undo_merge(self._live_unet(), self.number, self.plan.source.name, force=force)

    def set_scale(self, scale: Scale) -> None:
        """Change the strength, computed from the base bits: no drift. `scale` and errors as in `set_delta_scale`."""
        rescale_merge(self._live_unet(), self.number, self.plan.source.name, scale)

    def _live_unet(self) -> torch.nn.Module:
        """The UNet, or the reason why nothing can be done to it."""
        unet = self._unet()
        if unet is None:
            raise MergeError("The UNet that this merge was made on no longer exists.")
        return unet

    def __deepcopy__(self, memo: dict) -> "MergeHandle":
        return MergeHandle(copy.deepcopy(self._unet(), memo), self.number, self.plan, self.report)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_unet": _no_unet}

    def __enter__(self) -> "MergeHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.number is None or self.active:
            self.undo()

    def __repr__(self) -> str:
        now = "; active" if self.scale == self.report.scale else f"; now x {Strength(self.scale)}"
        if self.number is None:
            now = ""
        elif self._unet() is None:
            now = "; its UNet is gone"
        elif not self.active:
            now = "; undone"
        return folded(f"MergeHandle({self.report}{now})")


def _no_unet() -> None:
    """The reference of a handle whose UNet is elsewhere."""


def merge_delta(
    pipe_or_unet: Any, source: Any, scale: Scale | Strength = 1.0, *, conv_in: ConvIn = "pad", backup: Backup = "cpu"
) -> MergeHandle:
    """Add a delta to the weights of a UNet, in place, on whatever device they are.

    `source` is a state dict, a file, a folder, a short name or a Hub id (see `open_weights`); `scale` any finite
    number, or numbers by block, such as `{"down": 0.8, "mid": 1, "up": {"block_1": 0.5}}` (the choices: see
    `scales.strength_of`; what is not named keeps 1). Merges stack: the weights become round(base + sum_i s_i *
    delta_i), computed in fp32 and rounded once. Everything is checked before the first weight changes, and an error or
    an interrupt restores all of them.

    `backup` is where the base weights are kept, so that undoing restores every bit: "cpu" costs as much memory as the
    delta's weights (1.7 GB for SD 1.5 in fp16), "disk" a temporary file of that size (in TMPDIR), "none" nothing, but
    then nothing can be undone, and an interrupt waits until the merge is complete. `conv_in`: see `plan_merge`.

    Raises `MergeError` or `WeightSourceError` (both ValueErrors), also for a sum that overflows the weights' dtype.
    Warns if the same delta acts in the model already, and if the weights' dtype keeps less than half of the change
    (the report's `kept`).
    """
    begin = time.perf_counter()
    if backup not in get_args(Backup):
        raise MergeError(f"backup={backup!r} is unknown. Pass 'cpu', 'disk' or 'none'.")
    unet = find_network(pipe_or_unet)
    weights = usable_weights(unet)
    strength = strength_of(scale, weights)
    plan = plan_weights(weights, source, conv_in=conv_in)
    stack = stack_of(unet)
    check_unchanged(stack, weights)
    if any(plan.fingerprint == other.fingerprint for other in acting_plans(stack)):
        warn_user(
            f"{plan.source.name} is merged into this UNet already; now it counts twice. Take it out again "
            "(`unmerge_delta`), or change its strength instead (`set_delta_scale`; `set_perflow_scale` if "
            "`load_perflow` put it in)."
        )
    elif _acts_already(plan.source, unet):
        warn_user(
            f"{plan.source.name} acts in this model already: in its weights, as an exported pipeline has it, fused, "
            "or attached as a LoRA. Now it counts twice. Take this merge out again (`unmerge_delta`); if only the "
            "scheduler is missing, `set_scheduler(pipe, source)` gives it."
        )
    if backup == "none":
        number, nbytes = None, 0
        kept = _merge_permanently(stack, Layer(stack.count, plan, strength), weights)
    else:
        number = stack.count
        nbytes, kept = _merge_layer(stack, Layer(number, plan, strength), weights, backup)
    padded = tuple(edit.name for edit in plan.edits if edit.channels is not None)
    seconds = time.perf_counter() - begin
    report = MergeReport(
        plan.source.name,
        strength.given,
        len(plan.edits),
        plan.untouched,
        padded,
        plan.skipped,
        backup,
        nbytes,
        seconds,
        kept.share,
    )
    kept.warn(f"{plan.source.name} x {strength}", {weights[edit.name].dtype for edit in plan.edits})
    return MergeHandle(unet, number, plan, report)


def _acts_already(delta: WeightSource, unet: torch.nn.Module) -> bool:
    """Told by a few numbers of the base's weights, where the delta's header has them."""
    sample = base_sample(delta.metadata)
    share = share_within(sample, delta, unet, attached=True) if sample else None
    return share is not None and share > WITHIN


def unmerge_delta(pipe_or_unet: Any, *, force: bool = False) -> None:
    """Take the last merge out of a UNet. Without merges below it, every bit is what it was before.

    If something else changed the merged weights since, it raises rather than overwrite that; `force=True` overwrites.
    Raises `MergeError` if nothing is merged, or if it was merged with backup="none".
    """
    unet = find_network(pipe_or_unet)
    check_mergeable(stack_of(unet))
    undo_last(unet, force)


def set_delta_scale(pipe_or_unet: Any, scale: Scale) -> None:
    """Change the strength of the last merge (others: `handle.set_scale`), computed from the base bits: no drift.

    `scale` as in `merge_delta`. Raises `MergeError` as `unmerge_delta` does, for a scale that is no finite number or
    names no block, and for a sum that overflows. Warns as `merge_delta` does.
    """
    unet = find_network(pipe_or_unet)
    stack = stack_of(unet)
    check_mergeable(stack)
    rescale(unet, stack.layers[-1].number, scale)


def _merge_layer(
    stack: MergeStack, layer: Layer, weights: Mapping[str, torch.Tensor], backup: Backup
) -> tuple[int, Kept]:
    """Back up what is not backed up yet, then write; returns the bytes of the backup and what was kept."""
    names = [edit.name for edit in layer.plan.edits]
    new = {name: weights[name] for name in names if name not in stack.base}
    saved = save_bits(new, backup)
    try:
        stack.count += 1
        stack.base.update(saved.tensors)
        stack.saved.append(saved)
        kept = write_layers(stack, [*stack.layers, layer], weights, names)
    finally:
        drop_unused(stack)
    return saved.nbytes, kept


def _merge_permanently(stack: MergeStack, layer: Layer, weights: Mapping[str, torch.Tensor]) -> Kept:
    if stack.layers:
        raise MergeError(
            f"{stack.layers[-1].plan.source.name} is merged below with a backup, which a merge without one would make "
            "useless. Undo it first, or pass backup='cpu' or 'disk'."
        )
    check_sums([layer], {}, weights, layer.plan.edit_of)
    kept = add_permanently(layer, weights)
    stack.permanent.append(layer.plan)
    return kept
