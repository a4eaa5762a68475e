"""The mathematics of PeRFlow: noise paths, windows, the chord inside a window and ODE solvers; torch only, no I/O."""

from .chord import PREDICTION_TYPES, clean_estimate, coefficients, euler, interpolate, marginal, target
from .path import BASE_PREDICTIONS, NoisePath
from .solver import METHODS, solve
from .windows import Windows

__all__ = [
    "BASE_PREDICTIONS",
    "METHODS",
    "PREDICTION_TYPES",
    "NoisePath",
    "Windows",
    "clean_estimate",
    "coefficients",
    "euler",
    "interpolate",
    "marginal",
    "solve",
    "target",
]
