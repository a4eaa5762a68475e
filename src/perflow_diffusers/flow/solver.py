"""Solve the probability-flow ODE of a base model from a window's start to its end, one window per sample.

Symbols: `z` the state, (`x0`, `eps`) what the network says of it, `z = alpha x0 + sigma eps`, `h` a step in
`log(alpha / sigma)`. All methods work on any NoisePath: a DDIM step on the straight path is the Euler step in sigma.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .path import NoisePath, like

Predict = Callable[[Tensor, Tensor], Tensor]
Estimate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def solve(
    predict: Predict,
    path: NoisePath,
    z: Tensor,
    start: int | Tensor,
    end: int | Tensor,
    steps: int,
    method: str = "ddim",
    prediction: str = "epsilon",
) -> Tensor:
    """The state at `end`, like z, of the flow that is at `z` at `start`.

    `predict(z, timestep)` returns the network's output (B, ...) for states (B, ...) and integer path timesteps (B,)
    int64 in 1..N on z's device; guidance belongs into it, and so does the `- 1` of a network that counts 0..N-1.
    `z`: (B, ...) in the dtype to compute in (float32 or float64). `start`, `end`: integers or (B,) with
    N >= start > end >= 0; one batch may mix windows. `steps` >= 1 per window, on one grid of integers that serves
    states and network alike, and at most the timesteps of the narrowest window. `method`: "ddim" (order 1), "dpmpp_2m"
    (order 2, one evaluation a step) or "heun" (order 2, two). `prediction`: what the network predicts, see
    `NoisePath.to_x0_eps`. Raises ValueError for values outside these.
    """
    if method not in METHODS:
        raise ValueError(f"`method={method!r}`; expected one of {', '.join(METHODS)}.")
    grid = _grid(path, len(z), start, end, steps)
    device = z.device

    def estimate(z: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        # A grid on the tables' device keeps coefficients there; the network wants its timestep beside z.
        return path.to_x0_eps(predict(z, timestep.to(device)), z, timestep, prediction)

    return METHODS[method](estimate, path, z, grid)


def _grid(path: NoisePath, batch: int, start: int | Tensor, end: int | Tensor, steps: int) -> Tensor:
    """(steps + 1, batch) falling integer timesteps, equally spaced from start to end and rounded down."""
    device = path.alpha.device
    s, e = (torch.as_tensor(t, device=device).to(torch.int64).expand(batch) for t in (start, end))
    n = path.num_train_timesteps
    if not bool(((n >= s) & (s > e) & (e >= 0)).all()):
        raise ValueError(f"Windows from {s.tolist()} to {e.tolist()}; expected {n} >= start > end >= 0.")
    narrowest = int((s - e).min())
    if not 1 <= steps <= narrowest:
        raise ValueError(f"`steps={steps}` in a window of {narrowest} timesteps; expected 1 to {narrowest}.")
    j = torch.arange(steps + 1, device=device)[:, None]
    return torch.div(s * steps - (s - e) * j, steps, rounding_mode="floor")


def _ddim(estimate: Estimate, path: NoisePath, z: Tensor, grid: Tensor) -> Tensor:
    """DDIM with eta = 0 (arXiv 2010.02502, equation 12)."""
    for t, t_next in pairwise(grid):
        z = path.add_noise(*estimate(z, t), t_next)
    return z


def _dpmpp_2m(estimate: Estimate, path: NoisePath, z: Tensor, grid: Tensor) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2): x0 extrapolated in log(alpha / sigma) from the last two."""
    last: tuple[Tensor, Tensor] | None = None
    for t, t_next in pairwise(grid):
        (alpha, sigma), (alpha_next, sigma_next) = path.at(t), path.at(t_next)
        h = (alpha_next / sigma_next).log() - (alpha / sigma).log()
        x0, _ = estimate(z, t)
        ahead = x0
        if last is not None:
            x0_last, h_last = last
            # h is infinite from pure noise and to clean data: one first-order step there, as every 2M does.
            w = (h / (2 * h_last)).nan_to_num(nan=0.0, posinf=0.0)
            ahead = x0 + like(w, z) * (x0 - x0_last)
        shrink = sigma_next / sigma
        z = like(shrink, z) * z + like(alpha_next - alpha * shrink, z) * ahead
        last = x0, h
    return z


def _heun(estimate: Estimate, path: NoisePath, z: Tensor, grid: Tensor) -> Tensor:
    """Heun's trapezoid on `dz = x0 dalpha + eps dsigma`, whose Euler step is DDIM (cf. arXiv 2206.00364, algorithm 1).

    A step that ends where no noise is left stays first-order: no network was trained there. A path whose index 0
    repeats index 1 (`set_alpha_to_one=False`) asks the network at timestep 1, the same noise level.
    """
    for t, t_next in pairwise(grid):
        x0, eps = estimate(z, t)
        euler = path.add_noise(x0, eps, t_next)
        (alpha, sigma), (alpha_next, sigma_next) = path.at(t), path.at(t_next)
        noisy = sigma_next > 0
        if not bool(noisy.any()):
            return euler
        x0_next, eps_next = estimate(euler, t_next.clamp(min=1))
        half = noisy / 2
        z = euler + like(half * (alpha_next - alpha), z) * (x0_next - x0)
        z = z + like(half * (sigma_next - sigma), z) * (eps_next - eps)
    return z


METHODS = {"ddim": _ddim, "dpmpp_2m": _dpmpp_2m, "heun": _heun}
