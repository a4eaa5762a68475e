"""The guidance that a pipeline is called with, beside the one that its accelerator is made for.

A scheduler cannot set its pipeline's argument, and the pipelines' default of 7.5 ruins what is made for 1. So loading
says what to pass, and the first run that is far from it is noticed, once.
"""

import sys
from types import FrameType
from typing import Any

#: frames between a pipeline's call and the scheduler's `set_timesteps`: retrieve_timesteps, decorators
_DEPTH = 12


def passed_to_caller(is_caller: Any) -> float | None:
    """`guidance_scale` of the pipeline whose call is running, or None where none is found.

    The pipeline is the nearest caller for which `is_caller(self)` holds. Pipelines that were made of one another share
    a scheduler: only the call itself says whose run it is.
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_DEPTH):
        frame = frame.f_back if frame is not None else None
        if frame is None:
            return None
        names = frame.f_locals
        if "self" in names and is_caller(names["self"]):
            given = names.get("guidance_scale", getattr(names["self"], "_guidance_scale", None))
            return float(given) if isinstance(given, int | float) and not isinstance(given, bool) else None
    return None


def is_far(given: float, recommended: float) -> bool:
    """Whether a guidance is more than twice, or less than half, of the recommended one; up to 1 there is none."""
    one, other = max(given, 1.0), max(recommended, 1.0)
    return not 0.5 <= one / other <= 2


def notice(name: str, given: float, recommended: float, steps: int) -> str:
    """The sentence for a run that is far from what the accelerator is made for."""
    return (
        f"Drawing with guidance_scale={given:g} (the pipeline's own default, unless it was passed), but {name} is "
        f"made for {recommended:g}: pass num_inference_steps={steps}, guidance_scale={recommended:g}. (Said once.)"
    )
