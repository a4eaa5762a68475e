"""Deltas of UNet weights: open them lazily, compute them, merge them, and take them out to the last bit."""

from perflow_diffusers.weights.delta import Delta, compute_delta, content_hash
from perflow_diffusers.weights.errors import DeltaError, MergeError, WeightSourceError, WeightWriteError
from perflow_diffusers.weights.merge import MergeHandle, MergeReport, merge_delta, set_delta_scale, unmerge_delta
from perflow_diffusers.weights.plan import MergePlan, plan_merge
from perflow_diffusers.weights.source import SHORT_NAMES, HubSpec, WeightSource, open_weights

__all__ = [
    "SHORT_NAMES",
    "Delta",
    "DeltaError",
    "HubSpec",
    "MergeError",
    "MergeHandle",
    "MergePlan",
    "MergeReport",
    "WeightSource",
    "WeightSourceError",
    "WeightWriteError",
    "compute_delta",
    "content_hash",
    "merge_delta",
    "open_weights",
    "plan_merge",
    "set_delta_scale",
    "unmerge_delta",
]
