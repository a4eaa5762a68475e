from .schedulers.scheduling_perflow import PeRFlowScheduler  # noqa: F401
