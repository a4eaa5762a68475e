"""Deltas and LoRAs of UNet weights: open them lazily, compute, merge, take out to the last bit, shrink and convert."""

from perflow_diffusers.weights.combine import CombineReport, combine
from perflow_diffusers.weights.comfy import check_comfy, delta_for_comfy
from perflow_diffusers.weights.convert import check_convert, convert_lora
from perflow_diffusers.weights.delta import Delta, check_delta, compute_delta, content_hash
from perflow_diffusers.weights.errors import DeltaError, MergeError, WeightSourceError, WeightWriteError
from perflow_diffusers.weights.extract import check_extract, extract_lora
from perflow_diffusers.weights.files import FileMergeReport, merge_files
from perflow_diffusers.weights.info import WeightsInfo, describe_weights
from perflow_diffusers.weights.locate import is_local
from perflow_diffusers.weights.lora import as_delta
from perflow_diffusers.weights.lora_report import LoraReport
from perflow_diffusers.weights.merge import MergeHandle, MergeReport, merge_delta, set_delta_scale, unmerge_delta
from perflow_diffusers.weights.moments import measure_moments
from perflow_diffusers.weights.pack import ShrinkReport, check_shrink, shrink_delta
from perflow_diffusers.weights.plan import MergePlan, plan_merge
from perflow_diffusers.weights.source import SHORT_NAMES, HubSpec, WeightSource, open_weights

__all__ = [
    "SHORT_NAMES",
    "CombineReport",
    "Delta",
    "DeltaError",
    "FileMergeReport",
    "HubSpec",
    "LoraReport",
    "MergeError",
    "MergeHandle",
    "MergePlan",
    "MergeReport",
    "ShrinkReport",
    "WeightSource",
    "WeightSourceError",
    "WeightWriteError",
    "WeightsInfo",
    "as_delta",
    "check_comfy",
    "check_convert",
    "check_delta",
    "check_extract",
    "check_shrink",
    "combine",
    "compute_delta",
    "content_hash",
    "convert_lora",
    "delta_for_comfy",
    "describe_weights",
    "extract_lora",
    "is_local",
    "measure_moments",
    "merge_delta",
    "merge_files",
    "open_weights",
    "plan_merge",
    "set_delta_scale",
    "shrink_delta",
    "unmerge_delta",
]
