"""Low-rank approximation: how far from the optimum on the spectra that are hard for it."""

import pytest
import torch

from perflow_diffusers.weights.make.svd import Effort, Wanted, balanced, low_rank, squared_norm


def squares(matrix):
    """Squared singular values in float64, largest first."""
    return torch.linalg.svdvals(matrix.double()) ** 2


def ratio(matrix, found):
    """Error of an approximation over the optimal one of the same rank, both in float64."""
    error = matrix.double() - found.left.double() @ found.right.double()
    return (error.square().sum() / squares(matrix)[found.left.shape[1] :].sum()).sqrt().item()


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def graded(rows, columns, values):
    """A matrix with given singular values."""
    left, right = (
        torch.linalg.qr(random(size, len(values), seed).double())[0] for seed, size in ((1, rows), (2, columns))
    )
    return (left * values.double() @ right.T).float()


def approximate(matrix, rank, energy=None, **effort):
    return low_rank(matrix, Wanted(rank, energy), Effort(**effort), seed=0)


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(320, 700, 20), (700, 320, 20), (400, 400, 32), (300, 2000, 16)]
)
def test_flat_spectra_within_five_thousandths(rows, columns, rank):
    matrix = random(rows, columns).half().float()
    found = approximate(matrix, rank)
    assert found.bound is None  # the random basis is what is tested here
    assert 1 - 1e-6 <= ratio(matrix, found) <= 1.005


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_decaying_spectra_within_five_thousandths(decay):
    matrix = graded(300, 500, torch.arange(1, 301).double() ** -decay)
    assert 1 - 1e-6 <= ratio(matrix, approximate(matrix, 20)) <= 1.005


@pytest.mark.parametrize("low", [1e-3, 1e-5])
def test_steep_spectra_keep_their_small_values(low):
    values = torch.cat([torch.logspace(0, torch.tensor(low).log10().item(), 30), torch.full((270,), low / 10)])
    matrix = graded(300, 500, values)
    found = approximate(matrix, 24)
    assert found.bound is not None and ratio(matrix, found) <= 1.005
    assert found.bound == pytest.approx(squares(matrix)[24:].sum().item(), rel=1e-3)


@pytest.mark.parametrize("top", [20, 60])
@pytest.mark.parametrize("jitter", [0.0, 1e-4, 1e-2])
def test_many_equal_singular_values(top, jitter):
    values = torch.where(torch.arange(300) < top, 2.0, 1.0) * (1 + jitter * torch.linspace(1, 0, 300))
    matrix = graded(300, 400, values)
    assert 1 - 1e-6 <= ratio(matrix, approximate(matrix, 20)) <= 1.005


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_steps_and_clusters_of_singular_values(spread):
    steps = 2.0 ** -(torch.arange(300) // 24)
    cluster = torch.where(torch.arange(300) < 40, 5.0, 1.0) * (1 + spread * torch.linspace(1, 0, 300))
    for values in (steps, cluster):
        matrix = graded(300, 400, values)
        assert 1 - 1e-6 <= ratio(matrix, approximate(matrix, 20)) <= 1.005


@pytest.mark.parametrize("exact", [False, True])
def test_a_matrix_of_that_rank_is_found(exact):
    matrix = graded(200, 300, torch.ones(8))
    found = approximate(matrix, 12, exact=exact)
    up, down = balanced(found.left, found.right)
    assert torch.allclose(up @ down, matrix, atol=1e-6) and up.isfinite().all() and down.isfinite().all()


def test_exact_is_optimal_to_rounding():
    matrix = random(200, 300)
    found = approximate(matrix, 10, exact=True)
    assert ratio(matrix, found) == pytest.approx(1, abs=1e-6)
    assert found.bound == pytest.approx(squares(matrix)[10:].sum().item(), rel=1e-10)


@pytest.mark.parametrize("decay", [0.3, 0.5, 1.0])
def test_energy_takes_the_smallest_rank(decay):
    matrix = graded(520, 560, torch.arange(1, 521).double() ** -decay)
    kept = squares(matrix).cumsum(0) / squares(matrix).sum()
    for energy in (0.2, 0.3, 0.5, 0.7, 0.9):
        found = approximate(matrix, 520, energy)
        assert found.left.shape[1] == 1 + int((kept >= energy).nonzero()[0])


def test_the_random_basis_leaves_no_trace():
    """The global random numbers go on as if nothing had been drawn."""
    matrix = random(400, 400)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = approximate(matrix, 16)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(approximate(matrix, 16).left, first.left)


def test_more_effort_is_not_worse():
    matrix = random(400, 400)
    errors = [ratio(matrix, approximate(matrix, 16, power_iterations=count)) for count in (0, 1, 3)]
    assert errors[0] > errors[1] >= errors[2]


def test_factors_share_the_singular_values():
    found = approximate(graded(50, 80, torch.logspace(0, -6, 50)), 10)
    up, down = balanced(found.left, found.right)
    wanted = torch.logspace(0, -6, 50)[:10].sqrt()
    assert torch.allclose(up.norm(dim=0), wanted, rtol=1e-3) and torch.allclose(down.norm(dim=1), wanted, rtol=1e-3)
    zero_up, zero_down = balanced(torch.eye(3), torch.diag(torch.tensor([4.0, 1.0, 0.0])))
    assert torch.equal(zero_up @ zero_down, torch.diag(torch.tensor([4.0, 1.0, 0.0])))


def test_squared_norm_sees_what_is_not_finite():
    vector = torch.tensor([3.0, 4.0])
    assert squared_norm(vector) == pytest.approx(25) and squared_norm(vector.reshape(2, 1, 1)) == pytest.approx(25)
    for bad in (float("nan"), float("inf")):
        assert not squared_norm(torch.tensor([1.0, bad])) < float("inf")
