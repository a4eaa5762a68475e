"""Windows of noise levels: the shift of Esser et al. (eq. 23) in closed form, grids that keep every boundary."""

from fractions import Fraction
from itertools import pairwise

import pytest

from perflow_diffusers.flow import SigmaWindows, Windows


def exact(u, shift):
    """sigma = s u / (1 + (s - 1) u) in rational numbers."""
    u, s = Fraction(u), Fraction(shift)
    return s * u / (1 + (s - 1) * u)


@pytest.mark.parametrize("shift", [1, 2, 3, Fraction(1, 2), Fraction(63, 20)])
@pytest.mark.parametrize(("windows", "steps"), [(4, 4), (4, 8), (4, 6), (1, 5), (5, 12), (3, 3)])
def test_a_grid_is_even_in_the_shifted_time_of_each_window(shift, windows, steps):
    ours = SigmaWindows.uniform(windows, float(shift))
    wanted = []
    for i in range(windows):
        inside = steps // windows + (i < steps % windows)
        start, length = 1 - Fraction(i, windows), Fraction(1, windows)
        wanted += [exact(start - length * Fraction(j, inside), shift) for j in range(inside)]
    grid = ours.grid(steps)
    assert grid == pytest.approx([float(x) for x in [*wanted, 0]], abs=1e-15)
    assert set(ours.boundaries) <= set(grid) and grid[-1] == 0


@pytest.mark.parametrize("join", ["noisy", "clean"])
@pytest.mark.parametrize(("windows", "steps"), [(4, 3), (4, 2), (4, 1), (7, 3), (8, 5)])
def test_fewer_steps_join_the_windows_that_integer_windows_join(windows, steps, join):
    integers = Windows.uniform(windows, windows * 10, 0)
    same = {b: i for i, b in enumerate(integers.boundaries)}
    ours = SigmaWindows.uniform(windows, 3.0)
    assert ours.grid(steps, join) == [ours.boundaries[same[b]] for b in integers.grid(steps, join)]


def test_another_shift_moves_the_same_times():
    windows = SigmaWindows.uniform(4, 3.0).reshifted(1.5)
    assert windows.boundaries == pytest.approx(SigmaWindows.uniform(4, 1.5).boundaries, abs=1e-15)
    assert windows.shift == 1.5


def test_chosen_levels_end_at_the_last_boundary():
    windows = SigmaWindows((1.0, 0.6, 0.1), 2.0)
    assert windows.chosen([0.9, 0.3]) == [0.9, 0.3, 0.1]
    for wrong in ([], [0.5, 0.5], [0.2, 0.4], [1.1, 0.5], [0.5, 0.1], [float("nan")]):
        with pytest.raises(ValueError, match="Noise levels"):
            windows.chosen(wrong)


@pytest.mark.parametrize("wrong", [(1.0,), (0.5, 0.5), (1.2, 0.0), (1.0, -0.1), (1000, 750, 0), (True, 0.0), ("1", 0)])
def test_what_are_no_windows_is_refused(wrong):
    with pytest.raises(ValueError, match="boundaries"):
        SigmaWindows(wrong)


@pytest.mark.parametrize("shift", [0, -1.0, float("inf"), float("nan"), "3", True])
def test_what_is_no_shift_is_refused(shift):
    with pytest.raises(ValueError, match="shift"):
        SigmaWindows.uniform(4, shift)


def test_boundaries_fall_for_extreme_shifts():
    for shift in (1e-3, 30.0):
        assert all(a > b for a, b in pairwise(SigmaWindows.uniform(8, shift).grid(64)))
