"""Pipelines that have PeRFlow in their weights already: recognise them, and give them their scheduler."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perflow_diffusers.errors import ArtifactError, Unreachable
from perflow_diffusers.families.published import Published, published
from perflow_diffusers.flow import PREDICTION_TYPES
from perflow_diffusers.hub.artifact import PeRFlowArtifact
from perflow_diffusers.hub.find import Found
from perflow_diffusers.hub.said import FLOW_SCHEDULER, from_scheduler
from perflow_diffusers.io.documents import read_json
from perflow_diffusers.io.names import Where
from perflow_diffusers.io.repository import cached_folder, download_settings, list_repository

#: Beside `model_index.json` of an exported pipeline: our scheduler's configuration.
PIPELINE_SETTINGS = "perflow_scheduler_config.json"
_SNAPSHOT = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]")


def recognised(pipe: Any, where: Where | None = None) -> PeRFlowArtifact | None:
    """The settings of a pipeline whose weights are PeRFlow's own: exported, published, or said by its configuration.

    Asks the Hub only for an exported pipeline that came from there, at `where`. None for any other pipeline.
    """
    said = _exported(str(getattr(pipe, "name_or_path", None) or ""), where or Where())
    if said is not None:
        return said
    entry = published_pipeline(pipe)
    if entry is not None:
        return PeRFlowArtifact.from_header(entry.metadata)
    config = dict(getattr(getattr(pipe, "scheduler", None), "config", {}))
    if in_configuration(config):
        return _of(config, "the pipeline's scheduler configuration")
    return None


def in_configuration(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration, of any age, is one for PeRFlow's weights."""
    if config.get("_class_name") == FLOW_SCHEDULER:
        return True
    kinds = (config.get("perflow_type"), config.get("prediction_type"))
    return any(isinstance(kind, str) and kind in PREDICTION_TYPES for kind in kinds)


def published_pipeline(pipe: Any) -> Published | None:
    """The published pipeline that this one was loaded from: by Hub id, cache, or a local folder of that name."""
    name = str(getattr(pipe, "name_or_path", None) or "")
    cached = _SNAPSHOT.search(f"{name}/")
    entry = published(f"{cached[1]}/{cached[2]}") if cached else published(name) or published(Path(name).name)
    return entry if entry is not None and entry.form == "pipeline" else None


def _of(config: dict[str, Any], where: str) -> PeRFlowArtifact:
    return PeRFlowArtifact.of(Found(where, from_scheduler(config, where)))


def _exported(name: str, where: Where) -> PeRFlowArtifact | None:
    """What the file beside `model_index.json` says, in a folder or in a repository."""
    folder = Path(name)
    if name and folder.is_dir():
        path = folder / PIPELINE_SETTINGS
        return _of(read_json(path), str(path)) if path.is_file() else None
    if name.count("/") != 1 or published(name) is not None:
        return None
    try:
        repository = list_repository(name, where)
        if PIPELINE_SETTINGS not in repository.sizes:
            return None
        path = download_settings(repository, PIPELINE_SETTINGS)
    except Unreachable as error:
        try:
            path = cached_folder(name, where, error) / PIPELINE_SETTINGS
        except ArtifactError:
            return None
        if not path.is_file():
            return None
    return _of(read_json(path), f"{PIPELINE_SETTINGS} of {name}")


def settings_of(pipe: Any, where: Where | None = None) -> PeRFlowArtifact:
    """The same, or an `ArtifactError` that says what to do."""
    found = recognised(pipe, where)
    if found is None:
        name = getattr(pipe, "name_or_path", None)
        raise ArtifactError(
            f"{type(pipe).__name__} ({name or 'without a name'}) is no pipeline that is known to have PeRFlow in its "
            "weights. Pass the artefact whose settings it needs, `set_scheduler(pipe, source)`, or load an "
            "accelerator with `load_perflow(pipe, source)`."
        )
    return found
