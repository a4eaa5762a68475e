"""Artefacts: an accelerator with its settings, loaded in one call and published in one call."""

from perflow_diffusers.errors import ArtifactError, PushError
from perflow_diffusers.hub.artifact import PeRFlowArtifact, perflow_scheduler
from perflow_diffusers.hub.export import export_pipeline
from perflow_diffusers.hub.info import ArtifactInfo, describe, pull
from perflow_diffusers.hub.load import load_perflow, set_perflow_scale, set_scheduler, unload_perflow
from perflow_diffusers.hub.push import push_perflow

__all__ = [
    "ArtifactError",
    "ArtifactInfo",
    "PeRFlowArtifact",
    "PushError",
    "describe",
    "export_pipeline",
    "load_perflow",
    "perflow_scheduler",
    "pull",
    "push_perflow",
    "set_perflow_scale",
    "set_scheduler",
    "unload_perflow",
]
