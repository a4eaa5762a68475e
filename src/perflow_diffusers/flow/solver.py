"""Solve the probability-flow ODE of a base model from a window's start to its end, one window per sample.

Symbols: `z` the state, (`x0`, `eps`) what the network says of it, `z = alpha x0 + sigma eps`, `h` a step in
`log(alpha / sigma)`, half the log signal-to-noise ratio. All methods
work on any NoisePath: a DDIM step on the straight path is the Euler step in sigma.
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
    spacing: str = "time",
) -> Tensor:
    """The state at `end`, like z, of the flow that is at `z` at `start`.

    `predict(z, timestep)` returns the network's output (B, ...) for states (B, ...) and integer path timesteps (B,)
    int64 in 1..N on z's device; guidance belongs into it, and so does the `- 1` of a network that counts 0..N-1.
    `z`: (B, ...) in the dtype to compute in (float32 or float64). `start`, `end`: integers or (B,) with
    N >= start > end >= 0; one batch may mix windows. `steps` >= 1 per window, on one grid of integers that serves
    states and network alike, and at most the timesteps of the narrowest window. `method`: "ddim" (order 1),
    "dpmpp_2m", "deis" (order 2, one evaluation a step) or "heun" (order 2, two). `prediction`: what the network
    predicts, see `NoisePath.to_x0_eps`. `spacing`: "time" (equal steps of time) or "log_snr" (nearly equal ones of the
    log signal-to-noise ratio, which the second-order methods want: in time, the last steps are the widest by far).
    Raises ValueError for values outside these.
    """
    if method not in METHODS:
        raise ValueError(f"`method={method!r}`; expected one of {', '.join(METHODS)}.")
    if spacing not in SPACINGS:
        raise ValueError(f"`spacing={spacing!r}`; expected one of {', '.join(SPACINGS)}.")
    grid = _grid(path, len(z), start, end, steps, spacing)
    device = z.device

    def estimate(z: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        # A grid on the tables' device keeps coefficients there; the network wants its timestep beside z.
        return path.to_x0_eps(predict(z, timestep.to(device)), z, timestep, prediction)

    return METHODS[method](estimate, path, z, grid)


def _grid(
    path: NoisePath, batch: int, start: int | Tensor, end: int | Tensor, steps: int, spacing: str = "time"
) -> Tensor:
    """(steps + 1, batch) falling integer timesteps from start to end."""
    device = path.alpha.device
    s, e = (torch.as_tensor(t, device=device).to(torch.int64).expand(batch) for t in (start, end))
    n = path.num_train_timesteps
    if not bool(((n >= s) & (s > e) & (e >= 0)).all()):
        raise ValueError(f"Windows from {s.tolist()} to {e.tolist()}; expected {n} >= start > end >= 0.")
    narrowest = int((s - e).min())
    if not 1 <= steps <= narrowest:
        raise ValueError(f"`steps={steps}` in a window of {narrowest} timesteps; expected 1 to {narrowest}.")
    return SPACINGS[spacing](path, s, e, steps)


def _even_in_time(path: NoisePath, start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Equal steps, rounded down."""
    j = torch.arange(steps + 1, device=start.device)[:, None]
    return torch.div(start * steps - (start - end) * j, steps, rounding_mode="floor")


def _even_in_log_snr(path: NoisePath, start: Tensor, end: Tensor, steps: int) -> Tensor:
    """The timesteps nearest to equal steps of log(alpha / sigma), at least one apart."""
    rate = _rate(path).to(start.device)
    rising = rate.flip(0).contiguous()
    last = len(rate) - 1
    points = [start]
    for j in range(1, steps):
        wanted = torch.lerp(rate[start], rate[end], j / steps)
        clean = (last - torch.searchsorted(rising, wanted)).clamp(min=0, max=last - 1)  # at or above what is wanted
        nearer = (rate[clean] - wanted) > (wanted - rate[clean + 1])
        points.append((clean + nearer).maximum(end + steps - j).minimum(points[-1] - 1))
    return torch.stack([*points, end])


def _rate(path: NoisePath) -> Tensor:
    """(N + 1,) log(alpha / sigma) by timestep; where it is infinite (no noise, no data) the line is drawn on."""
    rate = path.alpha.log() - path.sigma.log()
    if path.sigma[0] == 0:
        rate[0] = 2 * rate[1] - rate[2]
    if path.alpha[-1] == 0:
        rate[-1] = 2 * rate[-2] - rate[-3]
    return rate


def _ddim(estimate: Estimate, path: NoisePath, z: Tensor, grid: Tensor) -> Tensor:
    """DDIM with eta = 0 (arXiv 2010.02502, equation 12)."""
    for t, t_next in pairwise(grid):
        z = path.add_noise(*estimate(z, t), t_next)
    return z


def _dpmpp_2m(estimate: Estimate, path: NoisePath, z: Tensor, grid: Tensor) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2): x0 extrapolated in log(alpha / sigma) from the last two.

    The first step of a window is of first order, and so is one that ends at the clean end: what the network says there
    is not smooth, and extrapolating it from wider steps does harm.
    """
    last: tuple[Tensor, Tensor] | None = None
    for t, t_next in pairwise(grid):
        (alpha, sigma), (alpha_next, sigma_next) = path.at(t), path.at(t_next)
        h = (alpha_next / sigma_next).log() - (alpha / sigma).log()
        x0, _ = estimate(z, t)
        ahead = x0
        if last is not None:
            x0_last, h_last = last
            # h is infinite from pure noise: one first-order step there, as every 2M does.
            w = (h / (2 * h_last)).nan_to_num(nan=0.0, posinf=0.0) * (t_next > 0)
            ahead = x0 + like(w, z) * (x0 - x0_last)
        shrink = sigma_next / sigma
        z = like(shrink, z) * z + like(alpha_next - alpha * shrink, z) * ahead
        last = x0, h
    return z


def _deis(estimate: Estimate, path: NoisePath, z: Tensor, grid: Tensor) -> Tensor:
    """Adams-Bashforth of order 2 on `d(z / alpha) = eps d(sigma / alpha)` (DEIS, arXiv 2204.13902, rho-AB1).

    DDIM is its Euler step; here eps is extrapolated from the last two evaluations.
    """
    last: tuple[Tensor, Tensor] | None = None
    for t, t_next in pairwise(grid):
        (alpha, sigma), (alpha_next, sigma_next) = path.at(t), path.at(t_next)
        h = sigma_next / alpha_next - sigma / alpha
        x0, eps = estimate(z, t)
        z = path.add_noise(x0, eps, t_next)
        if last is not None:
            eps_last, h_last = last
            # h_last is infinite after a step from pure noise, and 0 between equal noise levels: first order there.
            w = (alpha_next * h * h / (2 * h_last)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            z = z + like(w, z) * (eps - eps_last)
        last = eps, h
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


METHODS = {"ddim": _ddim, "dpmpp_2m": _dpmpp_2m, "deis": _deis, "heun": _heun}
SPACINGS = {"time": _even_in_time, "log_snr": _even_in_log_snr}
