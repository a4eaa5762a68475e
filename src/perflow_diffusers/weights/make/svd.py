"""Best approximations of low rank: M (m, n) ~ left (m, r) @ right (r, n), with the error known exactly."""

from dataclasses import dataclass

import torch

from perflow_diffusers.words.shown import shown

#: Below this share of the squared norm, the tail drowns in the rounding of fp32 squares: float64 takes over.
_STEEP = 1e-3
#: A matrix with fewer rows than this many times the basis costs no more in float64.
_SMALL = 8
_GRAM_COLUMNS = 2048


@dataclass(frozen=True)
class Wanted:
    """Which rank: exactly `rank`, or the smallest that keeps the share `energy` of the squared norm, at most `rank`.

    `rank` is in 1..min(m, n), `energy` in 0..1.
    """

    rank: int
    energy: float | None = None

    def choose(self, captured: torch.Tensor, total: float) -> int | None:
        """The rank, given captured[i] = squared norm that i + 1 components keep; None if these are too few."""
        if self.energy is not None:
            enough = torch.nonzero(captured >= self.energy * total * (1 - 1e-12))
            if len(enough) and int(enough[0]) < self.rank:
                return int(enough[0]) + 1
        return self.rank if len(captured) >= self.rank else None


@dataclass(frozen=True)
class Effort:
    """Exact, or by a random basis of rank + oversampling columns after so many power iterations."""

    exact: bool = False
    oversampling: int = 16
    power_iterations: int = 5


@shown
@dataclass(frozen=True)
class LowRank:
    """left (m, r) @ right (r, n), fp32, a projection of the matrix: the error is orthogonal to it.

    `captured` is its squared norm, `bound` the optimal squared error (Eckart-Young) where it is known.
    """

    left: torch.Tensor
    right: torch.Tensor
    captured: float
    bound: float | None = None


def squared_norm(matrix: torch.Tensor) -> float:
    """Squared Frobenius norm of fp32 numbers, to fp32 accuracy; NaN or Inf if one of them is."""
    rows = torch.linalg.vector_norm(matrix.reshape(matrix.shape[0] if matrix.ndim > 1 else 1, -1), dim=1)
    return rows.double().square().sum().item()


def low_rank(matrix: torch.Tensor, wanted: Wanted, effort: Effort, seed: int = 0) -> LowRank:
    """A low-rank approximation of a finite fp32 `matrix` (m, n) on the CPU.

    A large matrix of which a rank is wanted goes through `torch.svd_lowrank` (Halko et al. 2009, arXiv 0909.4061),
    whose error is within 1.005 of the optimal one with the defaults, also on flat spectra. Small matrices, steep
    spectra, a wanted energy (the rank is not known before) and `exact` go through the eigenvectors of the Gram matrix
    in float64: optimal to rounding as long as the relative error is above 1e-7 (the square root of float64's
    precision; fp32 factors resolve no less), and several times faster than an SVD.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    width = wanted.rank + effort.oversampling
    found = None
    if not effort.exact and wanted.energy is None and _SMALL * width < wide.shape[0]:
        found = _random(wide, wanted.rank, width, effort.power_iterations, seed)
    found = found or _gram(wide, wanted)
    if wide is matrix:
        return found
    return LowRank(found.right.T, found.left.T, found.captured, found.bound)


def balanced(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with each singular value shared: column i of `left` and row i of `right` get the same norm.

    Both factors then carry the square root of the singular values, which keeps their numbers in the middle of fp16's
    range: singular values of deltas reach from 1e-5 to 1e2, and one factor that held them alone, divided over
    thousands of entries, would fall among fp16's subnormal numbers (below 6e-5).
    """
    ratio = torch.linalg.vector_norm(right, dim=1) / torch.linalg.vector_norm(left, dim=0)
    share = torch.where((ratio > 0) & ratio.isfinite(), ratio, torch.ones_like(ratio)).sqrt()
    return left * share, right / share[:, None]


def rounding_loss(left: torch.Tensor, right: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """Squared norm of left @ right - up @ down for factors that differ by rounding, without forming a product."""
    more_left, more_right = left - up, right - down
    squares = (left.T @ left) * (more_right @ more_right.T) + (more_left.T @ more_left) * (down @ down.T)
    return (squares + 2 * (left.T @ more_left) * (more_right @ down.T)).double().sum().item()


def _gram(wide: torch.Tensor, wanted: Wanted) -> LowRank:
    """Through the eigenvectors of wide @ wide.T (m, m) in float64, m <= n; a few columns are widened at a time."""
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=wide.device)
    for part in wide.split(_GRAM_COLUMNS, dim=1):
        columns = part.double()
        gram.addmm_(columns, columns.T)
    values, vectors = torch.linalg.eigh(gram)
    energies = values.flip(0).clamp_(min=0)
    rank = wanted.choose(energies.cumsum(0), energies.sum().item()) or len(energies)
    left = vectors.flip(1)[:, :rank].float()
    right = left.T @ wide
    return LowRank(left, right, squared_norm(right), energies[rank:].sum().item())


def _random(wide: torch.Tensor, rank: int, width: int, iterations: int, seed: int) -> LowRank | None:
    """In a random basis of `width` columns; None for a spectrum so steep that fp32 does not resolve what is left."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(wide, q=width, niter=iterations)
    captured = values[:rank].double().square().sum().item()
    if squared_norm(wide) - captured < _STEEP * captured:
        return None
    return LowRank(left[:, :rank], (right[:, :rank] * values[:rank]).T, captured)
