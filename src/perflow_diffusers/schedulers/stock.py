"""diffusers' own samplers for comparison, each as it does best at few steps."""

from typing import Any

#: stock samplers, each with the timestep spacing and last sigma that suit it best on the miniature at few steps
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "Euler": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "DPM-Solver++": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
    ),
    "UniPC": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"}),
}


def stock_scheduler(name: str, config: Any) -> Any:
    """A diffusers scheduler of `STOCK` for a pipeline's scheduler config."""
    import diffusers

    kind, options = STOCK[name]
    return getattr(diffusers, kind).from_config(config, **options)
