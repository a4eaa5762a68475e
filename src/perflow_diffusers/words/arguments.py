"""Arguments of the wrong kind, told in a sentence before anything is done: swapped ones, text for numbers, None."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.errors import DeltaError, WeightWriteError


def in_words(value: Any) -> str:
    """What was passed, short enough for an error: `'miniature' (text)`, `the class UNet2DConditionModel`."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | bool | int | float | os.PathLike):
        text = repr(value)
        shown = text if len(text) <= 80 else f"{text[:76]} ..."
        kind = "text" if isinstance(value, str) else "a path" if isinstance(value, os.PathLike) else "a number"
        return f"{shown} ({kind})"
    kind = type(value).__name__
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return f"{'an' if kind[0] in 'AEIOUaeio' else 'a'} {kind}"


def path_of(value: Any, what: str, order: str, error: type[ValueError] = WeightWriteError) -> Path:
    """A path; `order` shows the call whose arguments may be swapped. Raises `error` for what is none."""
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise error(f"{what} is {in_words(value)}, where a path belongs: {order}.")
    return Path(value).expanduser()


def whole_number(value: Any, what: str, low: int, usual: str, error: type[ValueError] = DeltaError) -> int:
    """A whole number of at least `low`; raises `error` for strings, bools, fractions and smaller ones."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise error(f"{what}={value!r} is not {_at_least(low)}. {usual}")
    return value


def _at_least(low: int) -> str:
    return "a positive integer" if low == 1 else f"an integer of {low} or more"


def is_number(value: Any) -> bool:
    """Whether a value is a real number: Python's, numpy's or a tensor of one element, but no bool and no text."""
    if isinstance(value, bool | str | bytes) or value is None:
        return False
    return isinstance(value, int | float) or (hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0)


def dtype_of(value: Any) -> torch.dtype | None:
    """A dtype, given as such or by its name ("float16", "torch.float16"); None for what is none."""
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return found if isinstance(found, torch.dtype) else None


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`Did you mean 'miniature'? ` for what is nearly a known name, else nothing."""
    near = difflib.get_close_matches(given, list(known), 1, 0.75)
    return f"Did you mean '{near[0]}'? " if near else ""
