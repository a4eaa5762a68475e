"""diffusers schedulers around the mathematics of `perflow_diffusers.flow`."""

from .scheduling_flow_match_perflow import FlowMatchPeRFlowScheduler
from .scheduling_perflow import PeRFlowScheduler, PeRFlowSchedulerOutput

__all__ = ["FlowMatchPeRFlowScheduler", "PeRFlowScheduler", "PeRFlowSchedulerOutput"]
