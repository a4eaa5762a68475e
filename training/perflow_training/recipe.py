"""The options of a run, completed by what its pipeline says: which process, windows and layers they mean."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from perflow_diffusers.flow import SigmaWindows
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.config.yaml_words import plain
from perflow_training.teacher.observed import Observed, is_flow, watch

_BLOCK = re.compile(r"(^|\.)(\w*_)?(blocks|layers)\.\d+\.(?P<inside>.+)")
#: options of a diffusion's training that have no meaning where the pipeline itself gives the trajectories
ELSEWHERE = {
    "data_starts": 0.0, "zero_snr": False, "discrete_timesteps": 0, "rescale_betas_zero_snr": False,
    "aspect_buckets": False,
}  # fmt: skip


def completed(config: TrainingConfig, pipe: Any) -> TrainingConfig:
    """The options with their parameterisation. Raises ConfigError for those that this pipeline cannot have."""
    if not is_flow(pipe):
        if config.window_shift is not None or config.pipeline_arguments or config.flow:
            raise ConfigError(
                "`window_shift`, `pipeline_arguments` and `window_boundaries` from 1 on are for flow-matching bases, "
                f"and {type(pipe).__name__}'s is a diffusion with discrete betas. Leave them out."
            )
        return replace(config, prediction_type=config.prediction_type or "ddim_eps")
    if config.prediction_type not in (None, "velocity"):
        raise ConfigError(
            f"`prediction_type={config.prediction_type}`, and the base is one of flow matching, whose network "
            "predicts the velocity. Leave it out, or set it to velocity."
        )
    for name, usual in ELSEWHERE.items():
        if getattr(config, name) != usual:
            raise ConfigError(
                f"`{name}={getattr(config, name)}`, and the base is one of flow matching, whose windows are those of "
                f"its pipeline's own runs. Set it to {usual!r}."
            )
    if config.window_weights == "measured":
        raise ConfigError(
            "`window_weights=measured` needs a teacher that goes on from the middle, which a pipeline's run does not. "
            "Set it to equal, or give a number a window."
        )
    return replace(config, prediction_type="velocity")


def watched(config: TrainingConfig, pipe: Any) -> tuple[TrainingConfig, Observed, SigmaWindows]:
    """(options with windows and layers spelt out, the teacher, the windows) of a flow-matching pipeline in its place.

    Raises ConfigError for a pipeline that cannot be learnt by watching, and for options that it cannot have.
    """
    takes = inspect.signature(type(pipe).__call__).parameters
    observed = watch(pipe, call_arguments(config, takes), scale=config.mean_guidance)
    config, windows = windowed(config, observed)
    return config, observed, windows


def call_arguments(config: TrainingConfig, takes: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipeline is called with beside captions, of what its call `takes`: size, and `pipeline_arguments`."""
    size = {"height": config.resolution, "width": config.resolution} if config.resolution else {}
    given = plain(config.pipeline_arguments, "`pipeline_arguments`") if config.pipeline_arguments else {}
    if not isinstance(given, dict):
        raise ConfigError(
            f"`pipeline_arguments={config.pipeline_arguments!r}` must be names and values, such as "
            "'{num_frames: 17}'."
        )
    return {**{name: value for name, value in size.items() if name in takes}, **given}


def windowed(config: TrainingConfig, observed: Observed) -> tuple[TrainingConfig, SigmaWindows]:
    """(options with windows and layers spelt out, the windows) of a watched flow-matching base."""
    shift = observed.shift if config.window_shift is None else config.window_shift
    try:
        windows = SigmaWindows.of(config.window_boundaries, config.num_time_windows, shift)
    except ValueError as error:
        raise ConfigError(f"`window_boundaries` or `window_shift`: {error}") from error
    if windows.boundaries[0] != 1:
        raise ConfigError(f"`window_boundaries={config.window_boundaries}` must begin at 1: sampling starts there.")
    return spelt(config, windows, observed.runs.network, observed.guided.sampled_with(config.mean_guidance)), windows


def spelt(
    config: TrainingConfig, windows: SigmaWindows, network: nn.Module, guidance_scale: float | None
) -> TrainingConfig:
    """The options with these windows, the layers of `network` that get a LoRA, and what to sample with."""
    if config.recommended_guidance_scale is not None:
        guidance_scale = config.recommended_guidance_scale
    layers = config.lora_target_modules or block_layers(network)
    return replace(
        config,
        window_boundaries=list(windows.boundaries),
        window_shift=windows.shift,
        recommended_guidance_scale=guidance_scale,
        lora_target_modules=layers if config.lora_rank else None,
    )


def block_layers(network: nn.Module) -> list[str]:
    """How the names end of the linear layers inside a network's numbered blocks; what modulates norms is left out."""
    kinds: dict[str, set[type]] = {}
    for name, module in network.named_modules():
        if (block := _BLOCK.search(name)) and not any(word in name for word in ("norm", "modulation")):
            kinds.setdefault(block["inside"], set()).add(type(module))
    return [name for name, types in kinds.items() if all(issubclass(kind, nn.Linear) for kind in types)]
