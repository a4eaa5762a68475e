"""Few-step sampling for Stable Diffusion pipelines: PeRFlow's scheduler, its accelerators, and a miniature to try."""

import importlib
from typing import TYPE_CHECKING, Any

from perflow_diffusers._version import __version__
from perflow_diffusers.findable import make_findable

if TYPE_CHECKING:
    from perflow_diffusers.hub import (
        PeRFlowArtifact,
        export_pipeline,
        load_perflow,
        push_perflow,
        set_perflow_scale,
        set_scheduler,
        unload_perflow,
    )
    from perflow_diffusers.miniature import MINIATURE_GUIDANCE, load_miniature, miniature_prompts
    from perflow_diffusers.schedulers.scheduling_flow_match_perflow import FlowMatchPeRFlowScheduler
    from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler
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
    "FlowMatchPeRFlowScheduler",
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

# Where a name is imported from when it is first asked for: torch and diffusers take seconds.
_ROOMS = {
    "hub": (
        "PeRFlowArtifact",
        "export_pipeline",
        "load_perflow",
        "push_perflow",
        "set_perflow_scale",
        "set_scheduler",
        "unload_perflow",
    ),
    "miniature": ("MINIATURE_GUIDANCE", "load_miniature", "miniature_prompts"),
    "schedulers.scheduling_flow_match_perflow": ("FlowMatchPeRFlowScheduler",),
    "schedulers.scheduling_perflow": ("PeRFlowScheduler",),
    "weights": (
        "combine",
        "compute_delta",
        "convert_lora",
        "extract_lora",
        "measure_moments",
        "merge_delta",
        "open_weights",
        "set_delta_scale",
        "shrink_delta",
        "unmerge_delta",
    ),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_SUBMODULES = ("cli", "demo", "flow", "hub", "miniature", "pipelines", "schedulers", "weights")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
