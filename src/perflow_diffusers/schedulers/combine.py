"""`a * z + b * out` for numbers and for rows of numbers, rounded once to the dtype of z."""

from __future__ import annotations

import torch
from torch import Tensor


def beside(c: Tensor, sample: Tensor) -> Tensor:
    """Float64 numbers () or (B,) as at least float32 ones (B or 1, 1, ...), so that a half sample is promoted."""
    dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
    return c.to(dtype).to(sample.device).reshape(-1, *(1,) * (sample.ndim - 1))


def combine(z: Tensor, out: Tensor, a: float, b: float) -> Tensor:
    """a * z + b * out in at least float32, rounded once to z's dtype; a wide z costs no memory but the result."""
    if z.dtype in (torch.float32, torch.float64):
        return torch.mul(z, a).add_(out, alpha=b)
    return z.float().mul_(a).add_(out, alpha=b).to(z.dtype)


def euler_step(z: Tensor, out: Tensor, b: float) -> Tensor:
    """z + b * out, the product rounded by itself as in diffusers' Euler step, in at least float32; out's dtype."""
    if out.dtype in (torch.float32, torch.float64):
        return torch.mul(out, b).add_(z)
    return out.float().mul_(b).add_(z).to(out.dtype)


def combine_rows(z: Tensor, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same with one number per sample."""
    return (z.to(a.dtype) * a + out.to(a.dtype) * b).to(z.dtype)
