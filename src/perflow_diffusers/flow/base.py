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


#: The same of a flow-matching base, in the words of `FlowMatchEulerDiscreteScheduler`: those that the network depends
#: on, and those that only place a sampler's steps.
FLOW_NETWORK_FACTS = ("num_train_timesteps", "invert_sigmas")
FLOW_SHIFT_FACTS = ("shift", "use_dynamic_shifting")


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


def flow_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts about a flow-matching base that its scheduler's config states; `flow_shift` is its `shift`, too."""
    given = {"shift": config.get("flow_shift"), **{key: value for key, value in config.items() if value is not None}}
    return {key: given[key] for key in (*FLOW_NETWORK_FACTS, *FLOW_SHIFT_FACTS) if given.get(key) is not None}
