"""Few-step sampling for Stable Diffusion pipelines: PeRFlow's scheduler, its accelerators, and a miniature to try."""

from perflow_diffusers._version import __version__
from perflow_diffusers.hub import (
    PeRFlowArtifact,
    export_pipeline,
    load_perflow,
    push_perflow,
    set_perflow_scale,
    set_scheduler,
    unload_perflow,
)
from perflow_diffusers.hub.lookup import make_findable
from perflow_diffusers.miniature import MINIATURE_GUIDANCE, load_miniature, miniature_prompts
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler  # eager: saved pipelines look it up here
from perflow_diffusers.weights import (
    combine,
    compute_delta,
    convert_lora,
    extract_lora,
    measure_moments,
    merge_delta,
    open_weights,
    set_delta_scale,
    shrink_delta,
    unmerge_delta,
)

make_findable()  # by diffusers, which loads saved pipelines

__all__ = [
    "MINIATURE_GUIDANCE",
    "PeRFlowArtifact",
    "PeRFlowScheduler",
    "__version__",
    "combine",
    "compute_delta",
    "convert_lora",
    "export_pipeline",
    "extract_lora",
    "load_miniature",
    "load_perflow",
    "measure_moments",
    "merge_delta",
    "miniature_prompts",
    "open_weights",
    "push_perflow",
    "set_delta_scale",
    "set_perflow_scale",
    "set_scheduler",
    "shrink_delta",
    "unload_perflow",
    "unmerge_delta",
]
