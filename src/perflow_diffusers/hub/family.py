"""Whether a pipeline is of an accelerator's family: network, noise schedule, prediction and weights of its base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from perflow_diffusers.errors import ArtifactError
from perflow_diffusers.families import ANY_COMPONENTS, component_of
from perflow_diffusers.flow import (
    BASE_TYPES,
    FLOW_NETWORK_FACTS,
    FLOW_SHIFT_FACTS,
    NOISE_FACTS,
    base_of,
    flow_facts,
    noise_facts,
)
from perflow_diffusers.hub.artifact import PeRFlowArtifact
from perflow_diffusers.hub.network import component_in, live_shapes, misfit, relation
from perflow_diffusers.hub.recognise import published_pipeline, recognised
from perflow_diffusers.schedulers import FlowMatchPeRFlowScheduler, PeRFlowScheduler
from perflow_diffusers.schedulers.base_config import flow_refusal
from perflow_diffusers.weights import WeightSource
from perflow_diffusers.weights.read.live import find_network

logger = logging.get_logger("diffusers.perflow")  # below diffusers' own, so that its verbosity applies

_SAME_NOISE = 1e-6  # of alpha; float32 tables of one schedule differ by rounding


def check_pipeline(pipe: Any) -> torch.nn.Module:
    """The network of a pipeline that has a scheduler, too; what else is passed is told in a sentence.

    Raises `MergeError` for what has no network (a name, a class, None, a pipeline without its UNet or transformer),
    `ArtifactError` for a part of a pipeline, and for a pipeline with several.
    """
    several = [] if isinstance(pipe, torch.nn.Module) else _networks(pipe)
    if len(several) > 1:
        raise ArtifactError(
            f"{type(pipe).__name__} has several networks ({', '.join(f'`{name}`' for name in several)}), and an "
            "accelerator is for one. Merge a delta into each by itself (`merge_delta(pipe.transformer, delta)`), and "
            "set `pipe.scheduler = FlowMatchPeRFlowScheduler.from_config(pipe.scheduler.config, ...)`."
        )
    unet = find_network(pipe)
    if isinstance(pipe, torch.nn.Module):
        raise ArtifactError(
            f"{type(pipe).__name__} is a part of a pipeline and has no scheduler. Pass the whole pipeline: "
            "`load_perflow(pipe, source)`. For the weights alone there is `merge_delta(unet, source)`."
        )
    if getattr(pipe, "scheduler", None) is None:
        raise ArtifactError(f"{type(pipe).__name__} has no scheduler to make PeRFlow's from. Load the whole pipeline.")
    return unet


def _networks(pipe: Any) -> list[str]:
    return [name for name in ANY_COMPONENTS if isinstance(getattr(pipe, name, None), torch.nn.Module)]


def check_component(artifact: PeRFlowArtifact, delta: WeightSource, pipe: Any) -> None:
    """Refuse a UNet's weights for a transformer, and the reverse, whose networks share no setting to compare."""
    theirs, shapes, names = component_in(pipe), live_shapes(find_network(pipe)), delta.canonical[0]
    given = component_of(names)
    if theirs.startswith(given) or not shapes.keys().isdisjoint(names):
        return
    base = f" of {artifact.base_model}" if artifact.base_model else ""
    raise ArtifactError(
        f"{artifact.name} is for a `{given}`{base}, and {type(pipe).__name__} denoises with a `{theirs}` that has "
        "none of its weights. Nothing was changed. Take the accelerator of this family."
    )


def check_process(artifact: PeRFlowArtifact, config: Mapping[str, Any]) -> None:
    """Refuse a scheduler that is not one of flow matching for an accelerator of a flow.

    The reverse is said where `PeRFlowScheduler` is made.
    """
    reason = flow_refusal(config) if artifact.is_flow else None
    if reason is not None:
        raise ArtifactError(
            f"{artifact.name} is for a flow-matching base, and this pipeline's is another. {reason} Nothing was "
            "changed. If the base is one of flow matching and only its scheduler was changed, put back that which it "
            'came with: `FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")`.'
        )


def check_family(artifact: PeRFlowArtifact, pipe: Any, unet: torch.nn.Module, strict: bool) -> None:
    """Refuse a pipeline of another family; strict or not where its own settings may be wrong."""
    wrong = misfit(artifact.network, unet)
    part = "UNet" if component_in(pipe) == "unet" else "network"
    if wrong is not None:
        raise ArtifactError(
            f"{artifact.name} was trained for {artifact.base_model or 'another network'}; its {part} differs from "
            f"this pipeline's: {wrong}. Take the accelerator of this family."
        )
    doubts, unknown = scheduler_doubts(artifact, pipe.scheduler.config)
    remark_shift(artifact, pipe.scheduler.config)
    kind = relation(artifact.base_sample, unet)
    base = artifact.base_model or "its base"
    if kind == "unrelated":
        doubts.append(f"the {part} has the layers of {base}, but its weights have nothing in common with it")
    if _is_accelerated(pipe):
        if strict:
            raise ArtifactError(
                "PeRFlow is in this pipeline's weights already, as its scheduler or folder says, and "
                f"{artifact.name} would come on top. Nothing was changed. Call `set_scheduler(pipe)` to give it its "
                "scheduler, or load a base to accelerate it anew."
            )
        doubts.append("PeRFlow is in its weights already, as its scheduler or folder says")
    if doubts and strict:
        raise ArtifactError(
            f"{artifact.name} does not fit this pipeline: {'; '.join(doubts)}. Take the accelerator of its family, or "
            "pass strict=False if you know better."
        )
    for doubt in doubts:
        logger.warning(f"{artifact.name} may not fit this pipeline: {doubt}.")
    if kind == "fine-tune":
        logger.info(f"The pipeline's {part} is a fine-tune of {base}, which is the normal use of {artifact.name}.")
    if kind == "unknown":
        unknown.append("that the weights are of its base")
    if unknown:
        logger.log(
            logging.INFO if unknown == ["that the weights are of its base"] else logging.WARNING,
            f"{artifact.name} and this pipeline do not say enough to check {', '.join(unknown)}.",
        )


def warn_of_scheduler(artifact: PeRFlowArtifact, config: Mapping[str, Any]) -> None:
    """Log how a scheduler's configuration differs from that of the base, where nothing is refused."""
    for doubt in scheduler_doubts(artifact, config)[0]:
        logger.warning(f"{artifact.name} may not fit this pipeline: {doubt}.")
    remark_shift(artifact, config)


def remark_shift(artifact: PeRFlowArtifact, config: Mapping[str, Any]) -> None:
    """Log that a flow-matching pipeline places its steps otherwise than the accelerator's base, without effect."""
    given, said = flow_facts(config), artifact.noise
    if not artifact.is_flow:
        return
    dynamic = given.get("use_dynamic_shifting"), said.get("use_dynamic_shifting")
    both = [key for key in FLOW_SHIFT_FACTS if key in given and key in said and (key != "shift" or not all(dynamic))]
    different = [f"{key} is {given[key]} instead of {said[key]}" for key in both if given[key] != said[key]]
    if different:
        logger.warning(
            f"This pipeline's {' and '.join(different)}, as {artifact.name}'s base has it. That places a sampler's "
            f"steps and is no part of the network: the windows stay where they were trained (shift "
            f"{artifact.window_shift:g}), and the pipeline's own has no effect."
        )


def scheduler_doubts(artifact: PeRFlowArtifact, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """How the noise schedule and the base's prediction differ from those of the accelerator's base, and what of
    the two cannot be told for want of a fact on either side."""
    if artifact.is_flow:
        facts, said = flow_facts(config), artifact.noise
        both = [key for key in FLOW_NETWORK_FACTS if key in facts and key in said]
        different = [f"{key} is {facts[key]} instead of {said[key]}" for key in both if facts[key] != said[key]]
        return different, [] if both else ["that the network is told the same noise levels"]
    doubts, unknown = _noise_doubts(artifact.noise, config), []
    if not artifact.noise or not noise_facts(config):
        unknown.append("that the noise schedules agree")
    given = config.get("prediction_type")
    if artifact.base_prediction_type is None or given not in BASE_TYPES:
        unknown.append("that the bases predict the same")
    elif given != artifact.base_prediction_type:
        doubts.append(f"its base predicts {artifact.base_prediction_type}, this pipeline's {given}")
    return doubts, unknown


def _noise_doubts(wanted: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """What is different in two noise schedules, by key; none where keys differ and all numbers agree."""
    # Not every scheduler class can rescale its betas: an absent key says the same as its default.
    both_sides = (noise_facts(config), wanted)
    given, said = ({"rescale_betas_zero_snr": False, **facts} if facts else {} for facts in both_sides)
    both = [key for key in NOISE_FACTS if key in given and key in said and key != "trained_betas"]
    different = [f"{key} is {given[key]} instead of {said[key]}" for key in both if given[key] != said[key]]
    if "trained_betas" in said or ("trained_betas" in given and said):
        different.append("trained_betas are other ones, or only one of the two has them")
    return [] if different and _same_noise(said, given) else different


def _same_noise(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two complete schedules have the same noise at every timestep."""
    needed = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule"}
    if any("trained_betas" not in facts and not needed <= facts.keys() for facts in (first, second)):
        return False
    try:
        paths = [base_of(one).path for one in (first, second)]
    except (TypeError, ValueError):
        return False
    one, other = (path.alpha for path in paths)
    return one.shape == other.shape and bool((one - other).abs().max() < _SAME_NOISE)


def _is_accelerated(pipe: Any) -> bool:
    """Whether the pipeline came with PeRFlow in its weights, as far as its scheduler, name and folder say."""
    if (
        isinstance(pipe.scheduler, PeRFlowScheduler | FlowMatchPeRFlowScheduler)
        or published_pipeline(pipe) is not None
    ):
        return True
    folder = Path(str(getattr(pipe, "name_or_path", None) or ""))
    return folder.is_dir() and recognised(pipe) is not None
