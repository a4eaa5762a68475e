"""The scheduler's arguments, checked: its two types, its windows, the timesteps that someone chose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from ..flow import BASE_TYPES, PREDICTION_TYPES, Windows
from ..flow.chord import check_prediction_type


def split_types(prediction_type: str | None, perflow_type: str | None) -> tuple[str | None, str]:
    """(the base's type, PeRFlow's type) from the two keys of a config, or a ValueError that says where to look."""
    if prediction_type in PREDICTION_TYPES:
        if perflow_type not in (None, prediction_type):
            raise ValueError(
                f"`prediction_type={prediction_type!r}` and `perflow_type={perflow_type!r}` contradict each other. "
                f"Pass one of them, or the base's type ({', '.join(BASE_TYPES)}) as `prediction_type`."
            )
        perflow_type, prediction_type = prediction_type, None
    elif prediction_type is not None and prediction_type not in BASE_TYPES:
        raise ValueError(
            f"`prediction_type={prediction_type!r}`; expected PeRFlow's {', '.join(PREDICTION_TYPES)}, or what the "
            f"base predicts ({', '.join(BASE_TYPES)}) together with `perflow_type`."
        )
    if perflow_type not in (None, *PREDICTION_TYPES):
        note = "what the base model predicts belongs under `prediction_type`"
        raise ValueError(f"`perflow_type={perflow_type!r}`; expected {', '.join(PREDICTION_TYPES)} ({note}).")
    check_prediction_type(prediction_type if perflow_type is None else perflow_type)
    kind = str(perflow_type)
    return prediction_type or PREDICTION_TYPES[kind].base_prediction, kind


def windows_of(n: int, t_noise: float, t_clean: float, count: int | None, given: Sequence[int] | None) -> Windows:
    """The windows that the config's arguments describe."""
    numbers = all(isinstance(t, int | float) for t in (t_noise, t_clean))
    if not numbers or not 0 <= t_clean < t_noise <= 1 or round(t_clean * n) == round(t_noise * n):
        expected = f"1 >= t_noise > t_clean >= 0 and a timestep (1 of {n}) between them"
        raise ValueError(f"`t_noise={t_noise!r}` and `t_clean={t_clean!r}`; expected {expected}.")
    noise, clean = round(t_noise * n), round(t_clean * n)
    if given is None:
        if not isinstance(count, int) or not 1 <= count <= noise - clean:
            raise ValueError(f"`num_time_windows={count!r}`; expected an integer from 1 to {noise - clean}.")
        return Windows.uniform(count, noise, clean)
    if isinstance(given, str):
        raise ValueError(f"`window_boundaries={given!r}`; expected a list, such as [1000, 750, 500, 250, 0].")
    try:
        windows = Windows(tuple(given))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`window_boundaries={given}`: {error}") from None
    if (windows.boundaries[0], windows.boundaries[-1]) != (noise, clean):
        raise ValueError(
            f"`window_boundaries={list(given)}`; expected them to run from {noise} to {clean}, which is `t_noise` to "
            "`t_clean`: change one or the other."
        )
    if count not in (None, windows.num_windows):
        raise ValueError(
            f"`num_time_windows={count}` and `window_boundaries` of {windows.num_windows} windows; leave the "
            "first out, or pass `window_boundaries=None` for windows of equal length."
        )
    return windows


def explicit_points(windows: Windows, timesteps: Any) -> list[int]:
    """The timesteps of a run that someone chose, with the last boundary, where it ends."""
    first, last = windows.boundaries[0], windows.boundaries[-1]
    given = timesteps.tolist() if isinstance(timesteps, Tensor | np.ndarray) else timesteps
    try:
        given = list(given)
        right = bool(given) and all(a > b and b == int(b) for a, b in pairwise([first + 1, *given, last]))
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(
            f"`timesteps={given}`; expected strictly falling integers, at most {first} and more than {last}."
        )
    return [*map(int, given), last]
