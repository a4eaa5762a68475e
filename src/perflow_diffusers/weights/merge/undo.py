"""Take a merge out of a UNet, or change its strength, from the base bits; and why not, where they were not kept."""

from dataclasses import replace
from typing import Any

import torch

from perflow_diffusers.errors import MergeError
from perflow_diffusers.weights.merge.edits import Layer
from perflow_diffusers.weights.merge.layers import MergeStack, check_unchanged, stack_of, write_layers
from perflow_diffusers.weights.merge.plan import usable_weights
from perflow_diffusers.weights.scales import strength_of


def undo_merge(unet: torch.nn.Module, number: int | None, name: str, *, force: bool = False) -> None:
    """Take one merge out of a UNet by its number; `name` is its source, for errors, as in `unmerge_delta`."""
    layers = _layers_with(unet, number, name)
    numbers = [layer.number for layer in layers]
    if numbers[-1] != number:
        above = layers[numbers.index(number) + 1 :] if number is not None else []
        later = ", ".join(layer.plan.source.name for layer in reversed(above))
        raise MergeError(
            f"{name} is not the last merge on this UNet: merged after it, and to be undone before it: {later}. "
            "(`set_scale(0)` switches it off where it is.)"
        )
    undo_last(unet, force)


def rescale_merge(unet: torch.nn.Module, number: int | None, name: str, scale: Any) -> None:
    """Change the strength of one merge by its number; errors as in `set_delta_scale`."""
    _layers_with(unet, number, name)
    rescale(unet, number, scale)


def _layers_with(unet: torch.nn.Module, number: int | None, name: str) -> list[Layer]:
    """The merges of a UNet, or the reason why nothing can be done to one of them."""
    stack = stack_of(unet)
    if number is None:
        raise MergeError(_PERMANENT.format(name))
    if number in stack.lost:
        raise MergeError(_LOST.format(name))
    if all(layer.number != number for layer in stack.layers):
        raise MergeError(f"{name} is no longer merged: it was undone before.")
    return stack.layers


_PERMANENT = "{} was merged with backup='none', so nothing can undo or rescale it. Load the model again."
_LOST = (
    "{} was merged into this UNet before it was pickled, and a pickle keeps no copy of the base to go back to. Load "
    "the model again."
)


def check_mergeable(stack: MergeStack) -> None:
    """Refuse to undo or rescale what is not there."""
    if not stack.layers and stack.permanent:
        raise MergeError(_PERMANENT.format(stack.permanent[-1].source.name))
    if not stack.layers and stack.lost:
        name = list(stack.lost.values())[-1]
        raise MergeError("Nothing is merged that could be undone: " + _LOST.format(name))
    if not stack.layers:
        raise MergeError(
            "Nothing is merged into this UNet (or it was unpickled or loaded since). Call `merge_delta` first."
        )


def undo_last(unet: torch.nn.Module, force: bool) -> None:
    """Take out the merge that was done last; with `force` whatever has changed since."""
    stack = stack_of(unet)
    weights = usable_weights(unet)
    if force:
        stack.marks = {name: mark for name, mark in stack.marks.items() if name not in weights}
    check_unchanged(stack, weights)
    last = stack.layers[-1]
    write_layers(stack, stack.layers[:-1], weights, [edit.name for edit in last.plan.edits])


def rescale(unet: torch.nn.Module, number: int | None, scale: Any) -> None:
    """Write the merge of this number, and all others, from the base bits with another strength of it."""
    stack = stack_of(unet)
    weights = usable_weights(unet)
    strength = strength_of(scale, weights)
    check_unchanged(stack, weights)
    layers = [replace(layer, strength=strength) if layer.number == number else layer for layer in stack.layers]
    plan = next(layer.plan for layer in layers if layer.number == number)
    kept = write_layers(stack, layers, weights, [edit.name for edit in plan.edits])
    kept.warn(f"{plan.source.name} x {strength}", {weights[edit.name].dtype for edit in plan.edits})
