"""Deltas and LoRAs of UNet weights: open them lazily, compute, merge, take out to the last bit, shrink and convert."""

from perflow_diffusers.errors import DeltaError, MergeError, WeightSourceError, WeightWriteError
from perflow_diffusers.weights.info import WeightsInfo, describe_weights
from perflow_diffusers.weights.make.combine import CombineReport, combine
from perflow_diffusers.weights.make.comfy import check_comfy, delta_for_comfy
from perflow_diffusers.weights.make.convert import check_convert, convert_lora
from perflow_diffusers.weights.make.delta import Delta, check_delta, compute_delta, content_hash
from perflow_diffusers.weights.make.extract import check_extract, extract_lora
from perflow_diffusers.weights.make.moments import measure_moments
from perflow_diffusers.weights.make.report import LoraReport
from perflow_diffusers.weights.make.shrink import ShrinkReport, check_shrink, shrink_delta
from perflow_diffusers.weights.merge.edits import MergePlan
from perflow_diffusers.weights.merge.files import FileMergeReport, merge_files
from perflow_diffusers.weights.merge.handle import (
    MergeHandle,
    MergeReport,
    merge_delta,
    set_delta_scale,
    unmerge_delta,
)
from perflow_diffusers.weights.merge.plan import plan_merge
from perflow_diffusers.weights.read.locate import is_local
from perflow_diffusers.weights.read.lora import as_delta
from perflow_diffusers.weights.read.source import SHORT_NAMES, HubSpec, WeightSource, open_weights

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
