"""A world where everything is known: data N(mu, sigma0^2 I) on any NoisePath, its flow, teacher and ideal student.

Symbols: `z = alpha x0 + sigma eps`, `s_t^2 = alpha^2 sigma0^2 + sigma^2` the spread at t,
`c = (z_t - alpha_t mu) / s_t`, which the probability-flow ODE leaves constant along a trajectory.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from perflow_diffusers.flow import BASE_PREDICTIONS, NoisePath, coefficients
from perflow_diffusers.flow.path import like


@dataclass(frozen=True)
class GaussianWorld:
    """Data N(mu, sigma0^2 I); all tensors (B, ...) in float64, timesteps integers or (B,)."""

    path: NoisePath
    mu: float = 0.7
    sigma0: float = 0.4

    def spread(self, timestep):
        alpha, sigma = self.path.at(timestep)
        return (alpha**2 * self.sigma0**2 + sigma**2).sqrt()

    def mean(self, timestep):
        return self.path.at(timestep)[0] * self.mu

    def flow(self, z: Tensor, start, end) -> Tensor:
        """The exact state at `end` of the trajectory that is at z at `start`."""
        c = (z - like(self.mean(start), z)) / like(self.spread(start), z)
        return like(self.mean(end), z) + like(self.spread(end), z) * c

    def teacher(self, z: Tensor, timestep, prediction: str = "epsilon") -> Tensor:
        """The exact output of a base network with that prediction: posterior means of x0 and eps, combined."""
        alpha, sigma = self.path.at(timestep)
        off = (z - like(alpha * self.mu, z)) / like(self.spread(timestep) ** 2, z)
        x0, eps = self.mu + like(alpha * self.sigma0**2, z) * off, like(sigma, z) * off
        p, q = BASE_PREDICTIONS[prediction](alpha, sigma)
        return like(p, z) * x0 + like(q, z) * eps

    def chord_point(self, c: Tensor, start, end, timestep) -> Tensor:
        """The student's state at `timestep` on the trajectory c, written without the code under test."""
        u = (torch.as_tensor(start) - timestep).double() / (torch.as_tensor(start) - end).double()
        ends = [like(self.mean(t), c) + like(self.spread(t), c) * c for t in (start, end)]
        return (1 - like(u, c)) * ends[0] + like(u, c) * ends[1]

    def student(self, z: Tensor, timestep, start, end, prediction_type: str) -> Tensor:
        """The output of a perfectly distilled network at a point of the chord of its window."""
        u = (torch.as_tensor(start) - timestep).double() / (torch.as_tensor(start) - end).double()
        mean = torch.lerp(self.mean(start), self.mean(end), u)
        spread = torch.lerp(self.spread(start), self.spread(end), u)
        c = (z - like(mean, z)) / like(spread, z)
        z_s, z_e = (like(self.mean(t), z) + like(self.spread(t), z) * c for t in (start, end))
        lam, eta = coefficients(self.path, prediction_type, start, end)
        return (z_e - like(lam, z) * z_s) / like(eta, z)
