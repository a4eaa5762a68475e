"""Best approximations of low rank: M (m, n) ~ left (m, r) @ right (r, n), with the error known exactly."""

from dataclasses import dataclass

import torch

from perflow_diffusers.words.shown import shown

#: Below this share of the squared norm, the tail drowns in the rounding of fp32 squares: float64 takes over.
_STEEP = 1e-3
#: A basis is grown until what more of it could gain is this share of the squared error: 1.004 x the optimal error.
_CONVERGED = 0.007
_SUDDEN, _SLOWEST = 0.25, 0.9
#: Relative differences below which eigenvalues count as equal, and a new block as nothing new.
_EQUAL = _EXHAUSTED = 1e-3
_ENERGY_BLOCK = 32
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
    """Exact, or by a random basis of at most (power_iterations + 1) * (rank + oversampling) columns."""

    exact: bool = False
    oversampling: int = 16
    power_iterations: int = 2


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


def low_rank(matrix: torch.Tensor, wanted: Wanted, effort: Effort, generator: torch.Generator) -> LowRank:
    """A low-rank approximation of a finite fp32 `matrix` (m, n) on the CPU.

    By default a block Krylov method (Musco and Musco 2015, arXiv 1504.05477): as many products with the matrix as a
    randomised SVD with the same `oversampling` and `power_iterations`, but all iterates are kept as the basis, which
    is what reaches 1.005 of the optimal error on flat spectra. It stops early when more columns would gain nothing.
    Small matrices, steep spectra, many equal singular values and `exact` go through the eigenvectors of the Gram
    matrix in float64: optimal to rounding as long as the relative error is above 1e-7 (the square root of float64's
    precision; fp32 factors resolve no less), and several times faster than an SVD.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = None if effort.exact else _krylov(wide, wanted, effort, generator)
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


def _krylov(wide: torch.Tensor, wanted: Wanted, effort: Effort, generator: torch.Generator) -> LowRank | None:
    """Rayleigh-Ritz in the span of Y, GY, GGY, ..., G = wide @ wide.T, Y random; None where `_gram` is better."""
    rows, columns = wide.shape
    if wanted.energy is None:
        width = wanted.rank + effort.oversampling
        block = -(-2 * width // 5)  # narrow blocks gain more per column, wide ones are faster per column
        limit = -(-width * (effort.power_iterations + 1) // block) * block
    else:
        block = _ENERGY_BLOCK
        limit = rows // 4 // block * block
    if 2 * limit >= rows or limit == 0:
        return None
    total = squared_norm(wide)
    basis, images = torch.empty(limit, rows), torch.empty(limit, columns)
    ritz = torch.zeros(limit, limit, dtype=torch.float64, device=wide.device)
    history: list[torch.Tensor] = []
    new = wide @ torch.randn(columns, block, generator=generator)
    used = 0
    while True:
        start, used = used, used + block
        basis[start:used] = torch.linalg.qr(new)[0].T
        torch.mm(basis[start:used], wide, out=images[start:used])
        cross = images[:used] @ images[start:used].T
        ritz[:used, start:used], ritz[start:used, :used] = cross, cross.T
        square = ritz[:used, :used] if wanted.energy is not None else ritz[:used, :used].float()
        values = torch.linalg.eigvalsh(square).double().flip(0)
        history.append(values.cumsum(0))
        rank = wanted.choose(history[-1], total)
        if rank is not None and total - history[-1][rank - 1] < _STEEP * total:
            return None
        if rank is not None and _has_cluster(values[: rank + block], block):
            return None
        if rank is not None and _is_settled(history, rank, wanted, total):
            break
        if used == limit:
            if rank is None or wanted.energy is not None:
                return None
            break
        new = wide @ images[start:used].T
        before = torch.linalg.vector_norm(new)
        for _ in range(2):  # once more, because rounding leaves some of what was taken away
            new = new - basis[:used].T @ (basis[:used] @ new)
        if torch.linalg.vector_norm(new) < _EXHAUSTED * before:
            return None
    turn = torch.linalg.eigh(ritz[:used, :used])[1].flip(1)[:, :rank].float()
    right = turn.T @ images[:used]
    return LowRank(basis[:used].T @ turn, right, squared_norm(right))


def _has_cluster(values: torch.Tensor, block: int) -> bool:
    """Whether as many values as a block has columns are equal: it cannot see that there are more of them."""
    return bool((values[block - 1 :] > (1 - _EQUAL) * values[: len(values) - block + 1]).any())


def _is_settled(history: list[torch.Tensor], rank: int, wanted: Wanted, total: float) -> bool:
    """Whether a larger basis would change neither the chosen rank nor, by much, the error."""
    left = total - history[-1][rank - 1].item()
    if _to_come(history, rank) > _CONVERGED * left:
        return False
    if wanted.energy is None or rank == 1:
        return True
    # One component less falls short of the energy now: with a larger basis, too? Twice the estimate, to be sure.
    return history[-1][rank - 2].item() + 2 * _to_come(history, rank - 1) < wanted.energy * total


def _to_come(history: list[torch.Tensor], rank: int) -> float:
    """What `rank` components will still gain, if gains shrink as a geometric series does.

    By a half a block at best, and a tenth at worst, which is also assumed after a sudden drop: a cluster of singular
    values was found then, and what is to gain within the cluster has only begun to come.
    """
    past = [captured[rank - 1].item() for captured in history[-3:] if len(captured) >= rank]
    if len(past) < 3:
        return float("inf")
    gain, earlier = past[2] - past[1], past[1] - past[0]
    slope = gain / earlier if earlier > 0 else 0.0
    slope = _SLOWEST if slope < _SUDDEN else min(max(slope, 0.5), _SLOWEST)
    return max(gain, 0.0) * slope / (1 - slope)
