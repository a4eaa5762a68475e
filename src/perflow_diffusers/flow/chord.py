"""The straight line inside a window and what each parameterisation says about it (arXiv 2405.07510, section 3).

Symbols: a window runs from start `s` to end `e`; `z_t = z_s + u (z_e - z_s)` with `u = (t - s) / (e - s)` and velocity
`v = (z_e - z_s) / (e - s)`; a network output `out` means `z_e = lambda z_s + eta out`; `t = timestep / N`.

Timesteps are integers or int64 tensors (B,); coefficients come back as float64 tensors of their shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .path import BASE_PREDICTIONS, NoisePath, like

Index = int | Tensor


def _ddim_eps(path: NoisePath, start: Index, end: Index) -> tuple[Tensor, Tensor]:
    """The DDIM step from s to e: `lambda = alpha_e / alpha_s`, `eta = sigma_e - lambda sigma_s`."""
    (alpha_s, sigma_s), (alpha_e, sigma_e) = path.at(start), path.at(end)
    lam = alpha_e / alpha_s
    return lam, sigma_e - lam * sigma_s


def _diff_eps(path: NoisePath, start: Index, end: Index) -> tuple[Tensor, Tensor]:
    """Diffusion from e to s undone: `z_s = g z_e + sqrt(1 - g^2) out` with `g = alpha_s / alpha_e`."""
    g = path.at(start)[0] / path.at(end)[0]
    return 1 / g, -(1 - g * g).clamp(min=0).sqrt() / g


def _velocity(path: NoisePath, start: Index, end: Index) -> tuple[Tensor, Tensor]:
    """The output is v itself: `lambda = 1`, `eta = e - s`."""
    eta = _time(path, end) - _time(path, start)
    return torch.ones_like(eta), eta


@dataclass(frozen=True)
class PredictionType:
    """All that is to be known of one way of training PeRFlow weights.

    Fields: `coefficients`, (path, start, end) -> (lambda, eta). `base_prediction`, what such a network predicts in the
    words of diffusers' `prediction_type`, for other samplers; None where they have no word for it. `is_ddim`, whether
    its step over a whole window is a DDIM step. `zero_snr`, whether it is defined at a timestep without any data.
    """

    coefficients: Callable[[NoisePath, Index, Index], tuple[Tensor, Tensor]] = field(repr=False)
    base_prediction: str | None
    is_ddim: bool = False
    zero_snr: bool = False


PREDICTION_TYPES: dict[str, PredictionType] = {
    "ddim_eps": PredictionType(_ddim_eps, base_prediction="epsilon", is_ddim=True),
    "diff_eps": PredictionType(_diff_eps, base_prediction="epsilon"),
    "velocity": PredictionType(_velocity, base_prediction=None, zero_snr=True),
}


def check_prediction_type(prediction_type: str | None, path: NoisePath | None = None) -> None:
    """Raise ValueError unless `prediction_type` is one of PREDICTION_TYPES and defined on `path`."""
    row = PREDICTION_TYPES.get(prediction_type or "")
    if row is None:
        given = f"`prediction_type={prediction_type!r}`"
        if prediction_type is None:
            given = "`prediction_type` was not given: how were the PeRFlow weights trained?"
        elif prediction_type in BASE_PREDICTIONS:
            given += " is what the base model predicts, not how PeRFlow weights were trained."
        else:
            given += " is unknown."
        raise ValueError(
            f"{given} Pass one of {', '.join(PREDICTION_TYPES)} (see the weights' card, or `perflow info FILE`; "
            "PeRFlow cards older than April 2024 say epsilon and mean diff_eps)."
        )
    if path is not None and path.zero_terminal_snr and not row.zero_snr:
        defined = " or ".join(name for name, other in PREDICTION_TYPES.items() if other.zero_snr)
        raise ValueError(
            f"`prediction_type={prediction_type!r}` is not defined on a noise schedule with zero terminal SNR (lambda "
            f"is infinite at timestep N). Use {defined}, or a schedule that keeps some signal "
            "(`rescale_betas_zero_snr=False`)."
        )


def coefficients(path: NoisePath, prediction_type: str, start: Index, end: Index) -> tuple[Tensor, Tensor]:
    """(lambda, eta) of a window for one of PREDICTION_TYPES: `z_e = lambda z_s + eta out`."""
    check_prediction_type(prediction_type, path)
    return PREDICTION_TYPES[prediction_type].coefficients(path, start, end)


def euler(
    path: NoisePath, prediction_type: str, start: Index, end: Index, timestep: Index, timestep_next: Index
) -> tuple[Tensor, Tensor]:
    """(a, b) of the step along the chord: `z_next = a * z + b * out`, with `start >= timestep > end`.

    `v = ((lambda - 1) z + eta out) / D` with `D = lambda (t - s) + (e - t)`, hence `a = 1 + (t' - t) (lambda - 1) / D`
    and `b = (t' - t) eta / D`. `timestep_next=end` predicts the window's end, `timestep_next=start` its start.
    """
    lam, eta = coefficients(path, prediction_type, start, end)
    s, e, t = _time(path, start), _time(path, end), _time(path, timestep)
    pace = (_time(path, timestep_next) - t) / (lam * (t - s) + (e - t))
    return 1 + pace * (lam - 1), pace * eta


def clean_estimate(
    path: NoisePath, prediction_type: str, start: Index, end: Index, timestep: Index
) -> tuple[Tensor, Tensor]:
    """(p, q) of the estimate `x0 = p * z + q * out` that an output at a point of the chord implies.

    The output names both ends of the chord; x0 is the data (and eps the noise) whose diffusion marginals they are:
    `z_s = alpha_s x0 + sigma_s eps`, `z_e = alpha_e x0 + sigma_e eps`. For ddim_eps that is its own definition, eps
    being the output. It is *not* the chord run on to t = 0, which is no image on a curved path. Where both ends have
    one noise level (diffusers' tables repeat the first entry), the window's end itself is the estimate.
    """
    (a_s, b_s), (a_e, b_e) = (euler(path, prediction_type, start, end, timestep, to) for to in (start, end))
    (alpha_s, sigma_s), (alpha_e, sigma_e) = path.at(start), path.at(end)
    det = alpha_e * sigma_s - alpha_s * sigma_e
    flat = det == 0
    sigma_s, sigma_e = torch.where(flat, 1.0, sigma_s), torch.where(flat, 0.0, sigma_e)
    det = torch.where(flat, alpha_e, det)
    return (sigma_s * a_e - sigma_e * a_s) / det, (sigma_s * b_e - sigma_e * b_s) / det


def interpolate(z_start: Tensor, z_end: Tensor, start: Index, end: Index, timestep: Index) -> Tensor:
    """The chord's point z_t, like z_start (B, ...), between its ends; `start >= timestep >= end`, each () or (B,)."""
    # Of integers below 2^24, float32 gives the quotient of float64 rounded once: exact enough, and had everywhere.
    dtype = torch.float64 if z_start.dtype == torch.float64 else torch.float32
    return torch.lerp(z_start, z_end, like(_fraction(start, end, timestep, dtype), z_start))


def target(path: NoisePath, prediction_type: str, z_start: Tensor, z_end: Tensor, start: Index, end: Index) -> Tensor:
    """What the student should output anywhere in a window: `(z_e - lambda z_s) / eta`, like z_start (B, ...).

    `start`, `end`: integers or (B,), one window a sample. A window between two timesteps of one noise level has no
    ddim_eps or diff_eps target (eta = 0): the result is not finite there.
    """
    lam, eta = coefficients(path, prediction_type, start, end)
    return like(1 / eta, z_start) * (z_end - like(lam, z_start) * z_start)


def marginal(path: NoisePath, start: Index, end: Index, timestep: Index) -> tuple[Tensor, Tensor]:
    """(c_x0, c_noise) that put data and noise on the chord: `z_t = c_x0 * x0 + c_noise * noise`.

    The chord between the diffusion marginals of s and e with the same noise; equal to the diffusion marginal of t on
    the boundaries only. (The published scheduler noises images on the marginal of t, where no PeRFlow state is.)
    """
    home = path.alpha.device
    s, e, t = (torch.as_tensor(i, device=home) for i in (start, end, timestep))
    u = _fraction(s, e, t, torch.float64)
    (alpha_s, sigma_s), (alpha_e, sigma_e) = path.at(start), path.at(end)
    return torch.lerp(alpha_s, alpha_e, u), torch.lerp(sigma_s, sigma_e, u)


def _time(path: NoisePath, timestep: Index) -> Tensor:
    """t = timestep / N, float64, on the tables' device."""
    return torch.as_tensor(timestep, device=path.alpha.device).to(torch.float64) / path.num_train_timesteps


def _fraction(start: Index, end: Index, timestep: Index, dtype: torch.dtype) -> Tensor:
    """u = (t - s) / (e - s) in `dtype`."""
    s, e, t = (torch.as_tensor(i) for i in (start, end, timestep))
    return (t - s).to(dtype) / (e - s).to(dtype)
