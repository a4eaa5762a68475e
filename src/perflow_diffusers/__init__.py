"""Few-step sampling for Stable Diffusion pipelines: PeRFlow's scheduler, its deltas, and a miniature to try."""

from perflow_diffusers._version import __version__
from perflow_diffusers.miniature import MINIATURE_GUIDANCE, load_miniature, miniature_prompts
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler  # eager: saved pipelines look it up here
from perflow_diffusers.weights import compute_delta, merge_delta, set_delta_scale, unmerge_delta

__all__ = [
    "MINIATURE_GUIDANCE",
    "PeRFlowScheduler",
    "__version__",
    "compute_delta",
    "load_miniature",
    "merge_delta",
    "miniature_prompts",
    "set_delta_scale",
    "unmerge_delta",
]
