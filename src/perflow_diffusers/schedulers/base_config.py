"""What a diffusers scheduler config says of its base's noise: discrete betas that `NoisePath` makes again, or not."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from diffusers import schedulers
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import DummyObject

from ..flow import NOISE_FACTS

# Facts about the base network rather than choices of a sampler: never left to whichever scheduler reads the config.
# Zero terminal SNR is not among them: not every class can have it, and all that can leave it out by default.
NETWORK_FACTS = (*(fact for fact in NOISE_FACTS if fact != "rescale_betas_zero_snr"), "prediction_type")

FLOW_MATCHING = "flow matching"

#: Keys that no scheduler of discrete betas has, and what has them; the first one found names the process.
FOREIGN_KEYS = {
    "shift": "flow matching",
    "n_grid": "flow matching",
    "sigma_data": "EDM or consistency",
    "s_noise": "continuous noise levels",
    "s_churn": "continuous noise levels",
    "snr": "a stochastic differential equation",
    "beta_max": "a stochastic differential equation",
    "scaler": "continuous time",
    "noise_mode": "continuous time",
    "alpha_cum_start": "tokens",
    "block_length": "tokens",
    "corrector_steps": "tokens",
    "entropy_bound": "tokens",
    "masking_schedule": "tokens",
}


def check_is_config(config: Any) -> None:
    """Raise ValueError for a scheduler or a pipeline in the place of its config."""
    inner = getattr(getattr(config, "scheduler", config), "config", None)
    if not isinstance(config, dict) and inner is not None:
        place = "pipe.scheduler.config" if hasattr(config, "scheduler") else "scheduler.config"
        raise ValueError(f"A {type(config).__name__} is no configuration. Pass its configuration: `{place}`.")


def refusal(config: Mapping[str, Any], given: Collection[str] = ()) -> str | None:
    """Why the noise of a scheduler's config is not known to be discrete betas, in words; None where it is.

    `config` is any diffusers scheduler's: live, from its JSON file, or a plain dict without a class, which is taken at
    its word. `given` names facts that the caller brings along. Flow matching, EDM, consistency models, tokens and
    shifted noise levels are refused, whatever betas a config carries from elsewhere: sampled with betas they would
    give wrong pictures without a word.
    """
    process = _other_process(config)
    if process is not None and process.startswith(FLOW_MATCHING):
        return (
            f"This scheduler config belongs to {process}. PeRFlow's scheduler is for a diffusion with discrete betas, "
            "as Stable Diffusion 1, 2 and XL have it, and would draw wrong pictures here. For accelerators of a "
            "flow-matching base there is `FlowMatchPeRFlowScheduler.from_config(...)`. If the base is a diffusion and "
            "only its scheduler was changed, take the config that it came with: "
            '`DDIMScheduler.load_config(base, subfolder="scheduler")`.'
        )
    if process is not None:
        return (
            f"This scheduler config belongs to {process}. PeRFlow's scheduler is for a diffusion with discrete betas, "
            "as Stable Diffusion 1, 2 and XL have it, and would draw wrong pictures here. If the base is one of these "
            "and only its scheduler was changed, take the config that it came with: "
            '`DDIMScheduler.load_config(base, subfolder="scheduler")`.'
        )
    name = config.get("_class_name")
    has = {key for key in NETWORK_FACTS if config.get(key) is not None}.union(given)
    complete = "trained_betas" in has or has >= {"beta_start", "beta_end", "beta_schedule"}
    complete = complete or config.get("beta_schedule") == "squaredcos_cap_v2"
    if complete or name in (None, "PeRFlowScheduler") or _arguments(name) is not None:
        return None
    return (
        f"The config of {name} does not say the whole noise schedule, and its class is none of diffusers' that can be "
        "imported here, so that what it takes by default is not known. Pass `beta_start`, `beta_end` and "
        "`beta_schedule` (or `trained_betas`), as the base was trained with."
    )


def flow_refusal(config: Mapping[str, Any]) -> str | None:
    """Why a scheduler's config is not one of flow matching, in words; None where it is."""
    process = _other_process(config)
    if process is not None and process.startswith(FLOW_MATCHING):
        return None
    given = process or "a diffusion with discrete betas, or to no scheduler at all"
    return (
        f"This scheduler config belongs to {given}. FlowMatchPeRFlowScheduler is for flow-matching bases, whose "
        "scheduler is a FlowMatchEulerDiscreteScheduler or has `use_flow_sigmas`. For Stable Diffusion 1, 2 and XL "
        "there is `PeRFlowScheduler.from_config(...)`."
    )


def with_defaults(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with those facts that its file leaves to the defaults of its class, marked as defaults."""
    arguments = _arguments(config.get("_class_name")) or {}
    missing = {key: arguments[key].default for key in NETWORK_FACTS if key in arguments and key not in config}
    if not missing:
        return config
    return {**config, **missing, "_use_default_values": [*config.get("_use_default_values", []), *missing]}


def _other_process(config: Mapping[str, Any]) -> str | None:
    """What a config is of, and how that shows, if it is not of discrete betas."""
    name = config.get("_class_name")
    arguments = _arguments(name)
    keys = config if arguments is None else arguments
    if arguments is None or "beta_schedule" not in arguments:
        sign = f"`{name}`" if arguments is not None else "`{}` in it"
        foreign = next((key for key in FOREIGN_KEYS if key in keys), None)
        if foreign is not None:
            return f"{FOREIGN_KEYS[foreign]} ({sign.format(foreign)})"
        if arguments is not None:
            return f"a process without betas (`{name}` takes none)"
    live = (
        isinstance(config, FrozenDict) or "_use_default_values" in config
    )  # these hold every argument of their class
    if live and arguments is None and "beta_schedule" not in config:
        return "a process without betas (no `beta_schedule` in it)"
    if config.get("use_flow_sigmas"):
        return "flow matching (`use_flow_sigmas` in it)"
    if str(config.get("prediction_type")).startswith("flow"):
        return f"flow matching (`prediction_type={config['prediction_type']!r}`)"
    if config.get("timestep_type") == "continuous":
        return "continuous noise levels (`timestep_type='continuous'`)"
    if "snr_shift_scale" in config or "snr_shift_scale" in keys:
        return "shifted noise levels (`snr_shift_scale`, CogVideoX)"
    return None


def _arguments(name: Any) -> Mapping[str, inspect.Parameter] | None:
    """The constructor's arguments of one of diffusers' schedulers; None if it is none, or lacks its packages."""
    kind = getattr(schedulers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or isinstance(kind, DummyObject):
        return None
    return inspect.signature(kind).parameters
