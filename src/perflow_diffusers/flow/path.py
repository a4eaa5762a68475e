"""How data turns into noise: `z = alpha * x0 + sigma * eps`, one row per integer timestep (0 = clean, N = pure noise).

Symbols: `N` training timesteps, `abar` the cumulative product of `1 - beta`, `alpha = sqrt(abar)`,
`sigma = sqrt(1 - abar)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# What a network may predict, out = p * x0 + q * eps, as (alpha, sigma) -> (p, q).
BASE_PREDICTIONS = {
    "epsilon": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "sample": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
}


def like(coefficient: Tensor, z: Tensor) -> Tensor:
    """A float64 coefficient () or (B,) in z's dtype and device, shaped to multiply z (B, ...)."""
    fitted = coefficient.to(z.dtype).to(z.device)  # in this order: not every device has float64
    return fitted.reshape(-1, *(1,) * (z.ndim - 1)) if fitted.ndim else fitted


@dataclass(frozen=True, eq=False)
class NoisePath:
    """The tables of a noise schedule.

    Fields: `alpha`, `sigma`: (N + 1,) float64, both in [0, 1], index = integer timestep. Index i >= 1 is what
    diffusers calls `alphas_cumprod[i - 1]`: the network of a base model was trained to see i - 1 there, a PeRFlow
    student sees i (so a teacher's `predict` subtracts one). Coefficients are computed in float64 on the tables' device
    and cast last. Tables are made on the CPU, whatever the default device: not every device has float64.
    """

    alpha: Tensor
    sigma: Tensor

    def __post_init__(self) -> None:
        if self.alpha.ndim != 1 or self.alpha.shape != self.sigma.shape or len(self.alpha) < 2:
            shapes = tuple(self.alpha.shape), tuple(self.sigma.shape)
            raise ValueError(
                f"`alpha` and `sigma` have shapes {shapes}; expected two tables of one length N + 1 >= 2."
            )
        if self.alpha.dtype != torch.float64 or self.sigma.dtype != torch.float64:
            raise ValueError(
                f"The tables are {self.alpha.dtype} and {self.sigma.dtype}; expected float64: pass .double()."
            )

    def __repr__(self) -> str:
        n, sigma = self.num_train_timesteps, self.sigma
        return f"NoisePath(timesteps 0..{n}, sigma {sigma[0]:.4g} to {sigma[-1]:.4g}, on {sigma.device})"

    @classmethod
    def from_betas(
        cls,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        set_alpha_to_one: bool = False,
        rescale_betas_zero_snr: bool = False,
    ) -> NoisePath:
        """The path of a diffusers noise schedule; arguments as `DDIMScheduler` has them, defaults those of SD1.5.

        `trained_betas`, (N,) as a list, array or tensor, replaces the three arguments before it.
        `abar` is computed in float32 as diffusers does, bit for bit, because that is what the base was trained on; all
        that follows is float64. Raises ValueError for an unknown schedule, betas outside [0, 1] or too many of them.
        """
        if trained_betas is not None:
            betas = torch.as_tensor(trained_betas, dtype=torch.float32, device="cpu")
            if betas.shape != (num_train_timesteps,):
                raise ValueError(
                    f"`trained_betas` has shape {tuple(betas.shape)}; expected ({num_train_timesteps},): one beta per "
                    "training timestep. Pass the matching `num_train_timesteps`."
                )
        else:
            betas = _betas(num_train_timesteps, beta_start, beta_end, beta_schedule)
        if rescale_betas_zero_snr:
            betas = _rescale_zero_terminal_snr(betas)
        if not bool(((betas >= 0) & (betas <= 1)).all()):
            raise ValueError(
                f"The betas run from {betas.min():.4g} to {betas.max():.4g}; expected values in [0, 1]. Check "
                "`beta_start`, `beta_end` and `trained_betas`."
            )
        return cls.from_alphas_cumprod(torch.cumprod(1.0 - betas, dim=0), set_alpha_to_one)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, set_alpha_to_one: bool = False) -> NoisePath:
        """The path of a table `alphas_cumprod` (N,), values in [0, 1], falling with the index.

        The clean end, index 0, is `alphas_cumprod[0]`, or exactly 1 with `set_alpha_to_one`.
        """
        abar = torch.as_tensor(alphas_cumprod, device="cpu").to(torch.float64)
        if abar.ndim != 1 or len(abar) == 0 or not bool(((abar >= 0) & (abar <= 1)).all()):
            raise ValueError(
                f"`alphas_cumprod` of shape {tuple(abar.shape)} is no noise schedule; expected (N,) numbers in [0, 1]."
            )
        first = torch.ones_like(abar[:1]) if set_alpha_to_one else abar[:1]
        abar = torch.cat([first, abar])
        return cls(abar.sqrt(), (1 - abar).sqrt())

    @classmethod
    def straight(cls, num_train_timesteps: int = 1000) -> NoisePath:
        """The flow-matching path `z = (1 - sigma) * x0 + sigma * eps` with `sigma = timestep / N`."""
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps={num_train_timesteps}`; expected at least 1.")
        sigma = torch.arange(num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
        return cls(1 - sigma, sigma)

    @property
    def num_train_timesteps(self) -> int:
        """N, the timestep of pure noise."""
        return len(self.alpha) - 1

    @cached_property
    def zero_terminal_snr(self) -> bool:
        """Whether nothing of the data is left at timestep N, so that no epsilon says anything about it."""
        return bool(self.alpha[-1] == 0)

    def to(self, device: torch.device | str) -> NoisePath:
        """The same path with its tables on `device`, so that a training loop there never waits for the host."""
        return NoisePath(self.alpha.to(device), self.sigma.to(device))

    def at(self, timestep: int | Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at integer timesteps () or (B,) in 0..N: float64, of the timesteps' shape."""
        index = torch.as_tensor(timestep, device=self.alpha.device)
        return self.alpha[index], self.sigma[index]

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: int | Tensor) -> Tensor:
        """`alpha * x0 + sigma * noise` at integer timesteps () or (B,) in 0..N; x0, noise, result: (B, ...)."""
        alpha, sigma = self.at(timestep)
        return like(alpha, x0) * x0 + like(sigma, x0) * noise

    def to_x0_eps(
        self, out: Tensor, z: Tensor, timestep: int | Tensor, prediction: str = "epsilon"
    ) -> tuple[Tensor, Tensor]:
        """What a base network's output says about z: (x0, eps), each like z, with `z = alpha * x0 + sigma * eps`.

        `out`, `z`: (B, ...); `timestep`: integers () or (B,) in 0..N; `prediction`: epsilon, sample, v_prediction or
        flow. Solves out = p x0 + q eps together with z. Raises ValueError for another name, and for epsilon on a path
        that ends in pure noise, where it says nothing about x0.
        """
        if prediction not in BASE_PREDICTIONS:
            raise ValueError(f"`prediction={prediction!r}`; expected one of {', '.join(BASE_PREDICTIONS)}.")
        if prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError(
                "An epsilon-predicting network says nothing about the data at a noise level without any data (this "
                "path has zero terminal SNR). Use a v_prediction, sample or flow network."
            )
        alpha, sigma = self.at(timestep)
        p, q = BASE_PREDICTIONS[prediction](alpha, sigma)
        det = alpha * q - sigma * p
        x0 = like(q / det, z) * z - like(sigma / det, z) * out
        eps = like(alpha / det, z) * out - like(p / det, z) * z
        return x0, eps


def _betas(n: int, start: float, end: float, schedule: str) -> Tensor:
    """(n,) float32 betas, computed as diffusers computes them."""
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"`num_train_timesteps={n!r}`; expected an integer >= 1.")
    if not all(isinstance(beta, int | float) for beta in (start, end)):
        raise ValueError(f"`beta_start={start!r}` and `beta_end={end!r}`; expected two numbers in [0, 1].")
    if schedule == "scaled_linear" and (start < 0 or end < 0):
        raise ValueError(f"`beta_start={start}` and `beta_end={end}`; expected values in [0, 1].")
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32, device="cpu")
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32, device="cpu") ** 2
    if schedule == "squaredcos_cap_v2":
        bars = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
        betas = [min(1 - bars[i + 1] / bars[i], 0.999) for i in range(n)]
        return torch.tensor(betas, dtype=torch.float32, device="cpu")
    raise ValueError(
        f"`beta_schedule={schedule!r}`; expected one of {', '.join(BETA_SCHEDULES)}, or pass `trained_betas`."
    )


def _rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2305.08891: shift and scale sqrt(abar) so that it ends at 0 and starts where it was."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root -= last
    root *= first / (first - last)
    abar = root**2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
