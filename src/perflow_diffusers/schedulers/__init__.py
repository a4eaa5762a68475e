"""diffusers schedulers around the mathematics of `perflow_diffusers.flow`."""

from .scheduling_perflow import PeRFlowScheduler, PeRFlowSchedulerOutput

__all__ = ["PeRFlowScheduler", "PeRFlowSchedulerOutput"]
