"""What a launcher decides and what the options decide: one accelerator, with no word of either lost in silence."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin

from perflow_training.config import CHOICES, ConfigError, TrainingConfig, trackers

logger = logging.getLogger(__name__)
#: what `accelerate launch` sets where it is told to use these, and what they are
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
SPLITS = ("TP", "CP", "SP")  # processes that share a sample: every draw of ours is one of a process's own samples
SHARD = "To spread weights, gradients and optimiser state take FSDP2: training/configs/accelerate/fsdp2.yaml."


def with_launcher(config: TrainingConfig, environment: Mapping[str, str] = os.environ) -> TrainingConfig:
    """The options with those filled in that are left to the launcher, whose words are environment variables.

    An option that is set holds against the launcher, with a warning. Raises ConfigError for what cannot be had here.
    """
    _check_method(environment)
    config = _compiled(config, environment)
    asked, launched = config.mixed_precision, environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked is None and launched not in CHOICES["mixed_precision"]:
        known = ", ".join(filter(None, CHOICES["mixed_precision"]))
        raise ConfigError(f"The launcher asks for `mixed_precision: {launched}`, which is not one of {known}.")
    if asked is not None and launched not in ("no", asked) and environment.get("RANK", "0") == "0":
        logger.warning(
            "The launcher asks for mixed_precision %s and the options for %s, which is taken. Leave the option out to "
            "take the launcher's.",
            launched,
            asked,
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps.isdecimal() and int(steps) != config.gradient_accumulation_steps:
        raise ConfigError(
            f"The launcher asks for {steps} steps of gradient accumulation (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) "
            f"and the options for {config.gradient_accumulation_steps}. Set `gradient_accumulation_steps={steps}`, or "
            "unset the variable."
        )
    return replace(config, mixed_precision=asked or launched)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run whose options are those of `with_launcher`. Raises ConfigError."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    available = {kind.value for kind in get_available_trackers()}
    for name in trackers(config):
        if name not in available:  # accelerate itself would leave it out without a word
            raise ConfigError(f"`report_to={config.report_to}` needs the package {name}: pip install {name}.")
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # not as a number, which a variable of the environment would replace
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
            dynamo_backend="no",  # the trainer compiles, and teacher and student alike
            log_with=trackers(config) or None,
            project_dir=config.output_dir,
        )
    except ValueError as error:  # fp16 on a CPU, for example
        raise ConfigError(f"`mixed_precision={config.mixed_precision}` is not possible here: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ConfigError("`mixed_precision=fp16` needs a GPU. Take bf16 or no on a CPU.")
    return accelerator


def _check_method(environment: Mapping[str, str]) -> None:
    for variable, method in REFUSED.items():
        if _true(environment, variable):
            raise ConfigError(f"The launcher asks for {method}, which this training does not use. {SHARD}")
    split = [name for name in SPLITS if environment.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") not in ("", "1")]
    if split and _true(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ConfigError(
            f"The launcher splits samples over processes (parallelism_config {', '.join(split)}); here every process "
            f"has samples of its own. {SHARD}"
        )
    if _true(environment, "ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("The launcher asks for FSDP 1, whose parameters have no names. Set `fsdp_version: 2`.")


def _compiled(config: TrainingConfig, environment: Mapping[str, str]) -> TrainingConfig:
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend in ("", "no") or config.torch_compile:
        return config
    if backend != "inductor":
        raise ConfigError(
            f"The launcher asks for `dynamo_backend: {backend}`. Set it to 'no'; `torch_compile=true` compiles both "
            "teacher and student with inductor."
        )
    return replace(config, torch_compile=True)


def _true(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "").lower() in ("true", "1", "yes")
