"""Where a teacher is read from: its pipeline, with or without what encodes, and the folder that it came from."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from perflow_diffusers.families import ANY_COMPONENTS, NETWORKS, sole_network
from perflow_diffusers.io.names import Where
from perflow_diffusers.io.repository import reached
from perflow_training.config import TrainingConfig
from perflow_training.errors import ConfigError

MODEL_INDEX = "model_index.json"


def load_pipeline(
    config: TrainingConfig, *, encoders: bool = True, folder: str | Path | None = None
) -> DiffusionPipeline:
    """The teacher's pipeline in float32; without `encoders` only its network and schedule are read.

    `folder` is where `folder_of` has found it when it was read before: the Hub is not asked again, where its files may
    have changed or be out of reach. Raises ConfigError for a name that is no pipeline.
    """
    name = config.pretrained_model_name_or_path
    if folder is not None and (Path(folder) / MODEL_INDEX).is_file():
        name = str(folder)
    left_out: dict[str, Any] = {}
    try:
        where = hub_options(name, config.revision)
        components = DiffusionPipeline.load_config(name, **where)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`pretrained_model_name_or_path={name}` is neither the folder of a diffusers pipeline nor a Hub id that "
            f"can be had: {error}"
        ) from error
    if not encoders:
        needed = {*ANY_COMPONENTS, "scheduler"}
        left_out = {part: None for part, kind in components.items() if isinstance(kind, list) and part not in needed}
    elif "safety_checker" in components:
        left_out = {"safety_checker": None, "requires_safety_checker": False}
    left_out = {**_missing(components), **left_out}
    return DiffusionPipeline.from_pretrained(name, dtype=torch.float32, variant=config.variant, **where, **left_out)


def _missing(components: Mapping[str, Any]) -> dict[str, None]:
    """What a pipeline's class wants and its folder has not: diffusers' loader is told so (a T5 that was left out)."""
    kind = getattr(diffusers, str(components.get("_class_name")), None)
    if kind is None:
        return {}
    wanted = inspect.signature(kind.__init__).parameters.values()
    there = {name for name, value in components.items() if not isinstance(value, list) or value[0] is not None}
    return {
        one.name: None for one in wanted if one.name not in {"self", *there} and one.default is inspect.Parameter.empty
    }


def hub_options(name: str, revision: str | None) -> dict[str, Any]:
    """What diffusers' loaders are given beside `name`; of a Hub id it is asked once whether the Hub answers.

    Their own asking takes half a minute. Raises `WeightSourceError` for an id that neither the Hub nor the cache has.
    """
    if Path(name).exists():
        return {}
    where = reached(name, Where(revision=revision))
    return {"revision": where.revision, "local_files_only": where.local_files_only}


def folder_of(pipe: DiffusionPipeline) -> Path | None:
    """The folder that a pipeline was read from, in the Hub's cache or elsewhere; None if that is not known."""
    network = sole_network(pipe, ConfigError)
    folder = Path(str(network.config.get("_name_or_path", ""))).absolute().parent
    return folder if (folder / MODEL_INDEX).is_file() else None


def network_config(name: str, where: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(component, config) of the network of a pipeline that is not loaded; `where` is `hub_options(name, ...)`.

    Raises ConfigError for a pipeline without a network that is known.
    """
    index = DiffusionPipeline.load_config(name, **where)
    row = next((one for one in NETWORKS if one.component in index), None)
    if row is None:
        raise ConfigError(f"{name} has no {' or '.join(one.component for one in NETWORKS)}, which is what is trained.")
    return row.component, getattr(diffusers, row.class_name).load_config(name, subfolder=row.component, **where)
