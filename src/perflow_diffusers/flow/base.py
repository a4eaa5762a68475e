"""A base's noise schedule and prediction, read from the config of its scheduler: the one reader of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .chord import PREDICTION_TYPES
from .path import NoisePath

#: What the network of a base may predict, in the words of diffusers' schedulers of discrete betas.
BASE_TYPES = ("epsilon", "sample", "v_prediction")

#: The facts about a base's noise in a scheduler's config: what a pipeline must share for an accelerator to fit.
NOISE_FACTS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "rescale_betas_zero_snr",
    "trained_betas",
)


@dataclass(frozen=True)
class Base:
    """What a base network was trained on.

    Fields: `path`, its noise by timestep. `prediction`, what it predicts (a name of `BASE_PREDICTIONS`); None where
    the config does not say. `index_offset`: the network is told the path's integer timestep plus this.
    """

    path: NoisePath
    prediction: str | None
    index_offset: int


def base_of(config: Mapping[str, Any]) -> Base:
    """The base behind a diffusers scheduler's config of discrete betas.

    `config` holds the arguments of `NoisePath.from_betas` as far as they differ from their defaults, those of SD 1.5,
    and `prediction_type`, where PeRFlow's own types stand for what their networks predict; other keys have no bearing.
    A network of discrete betas counts its timesteps from 0, one below the path's. Raises ValueError for facts that are
    out of range.
    """
    wanted = (*NOISE_FACTS, "set_alpha_to_one")
    path = NoisePath.from_betas(**{key: config[key] for key in wanted if key in config})
    prediction = config.get("prediction_type")
    ours = PREDICTION_TYPES.get(prediction)  # type: ignore[arg-type]
    return Base(path, prediction if ours is None else ours.base_prediction, index_offset=-1)


def noise_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about noise that a config states, by their names; those that are None say nothing."""
    return {key: config[key] for key in NOISE_FACTS if config.get(key) is not None}
