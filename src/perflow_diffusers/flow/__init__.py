"""The mathematics of PeRFlow: noise paths, windows, the chord inside a window and ODE solvers; torch only, no I/O."""

from .base import BASE_TYPES, FLOW_NETWORK_FACTS, FLOW_SHIFT_FACTS, NOISE_FACTS, Base, base_of, flow_facts, noise_facts
from .chord import PREDICTION_TYPES, PredictionType, clean_estimate, coefficients, euler, interpolate, marginal, target
from .path import BASE_PREDICTIONS, NoisePath
from .sigma_windows import SigmaWindows
from .solver import METHODS, solve
from .windows import Windows

__all__ = [
    "BASE_PREDICTIONS",
    "BASE_TYPES",
    "FLOW_NETWORK_FACTS",
    "FLOW_SHIFT_FACTS",
    "METHODS",
    "NOISE_FACTS",
    "PREDICTION_TYPES",
    "Base",
    "NoisePath",
    "PredictionType",
    "SigmaWindows",
    "Windows",
    "base_of",
    "clean_estimate",
    "coefficients",
    "euler",
    "flow_facts",
    "interpolate",
    "marginal",
    "noise_facts",
    "solve",
    "target",
]
