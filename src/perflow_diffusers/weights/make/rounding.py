"""A base that is stored more finely than the tuned model: what of their difference is only the base's rounding."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.io.tensors import dtype_names
from perflow_diffusers.words.notices import warn_user

_MUCH = 0.1  # share of the difference, or of its numbers; of a change of more than a weight's step there is none


def coarser(base: torch.dtype, tuned: torch.dtype) -> torch.dtype | None:
    """The dtype of the tuned weights if its steps are wider than those of the base's, else None."""
    return tuned if torch.finfo(tuned).eps > torch.finfo(base).eps else None


def rounded(name: str, weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A weight of the base in `dtype`, or as it is for None; raises `DeltaError` if it overflows there."""
    if dtype is None:
        return weight
    small = weight.detach().to("cpu", dtype)
    if not small.float().isfinite().all():
        raise DeltaError(
            f"{name} of the base has numbers that {dtype}, the dtype of the tuned weights, cannot hold. Leave "
            "round_base off, or take the base in the dtype that the tuned model was made from."
        )
    return small


def rounding_note(dtypes: Iterable[torch.dtype | None]) -> str:
    """Names of the dtypes to which tensors of a base are rounded, for a header: "F16", or ""."""
    return dtype_names(dtype for dtype in dtypes if dtype is not None)


@dataclass
class RoundingNoise:
    """Sums over tensors: squares of the difference and of what rounding the base leaves of it; numbers that are noise.

    `noise` counts the numbers of tensors that rounding alone makes different, `numbers` those of all tensors.
    """

    squares: float = 0.0
    left: float = 0.0
    noise: int = 0
    numbers: int = 0

    def add(self, base: torch.Tensor, tuned: torch.Tensor, difference: torch.Tensor, size: float) -> None:
        """Count one tensor; `difference` is the exact tuned - base, `size` the square of its norm."""
        self.numbers += difference.numel()
        self.squares += size
        dtype = coarser(base.dtype, tuned.dtype)
        if dtype is None:
            self.left += size
            return
        small = base.detach().to("cpu", dtype).to(difference.dtype)
        left = small.sub_(tuned.detach().to("cpu", difference.dtype)).norm().item() ** 2
        self.left += left
        if size and not left:
            self.noise += difference.numel()

    def warn(self, base: str, tuned: str) -> None:
        """Say how much of a difference is rounding, if it is much."""
        share = 1 - self.left / self.squares if self.squares else 0.0
        tensors = self.noise / self.numbers if self.numbers else 0.0
        if max(share, tensors) < _MUCH:
            return
        warn_user(
            f"{tuned} is stored more coarsely than {base}, and much of their difference is only that: "
            f"{100 * max(share, 0.0):.0f} % of its squared norm, and all of it in {100 * tensors:.0f} % of the "
            "numbers. round_base=True (--round-base) subtracts from the base in the tuned model's dtype."
        )
