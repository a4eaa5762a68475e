"""Windows and grids against exact fractions and brute force."""

from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch

from perflow_diffusers.flow import Windows

UNEVEN = Windows((1000, 900, 400, 30, 0))


def exact_grid(k, n):
    """The published rule in exact arithmetic: t = s + (e - s) j / steps inside each window, then floor(1000 t)."""
    points = []
    for i in range(k):
        steps = n // k + (i < n % k)
        points += [floor(1000 * (1 - Fraction(i, k) - Fraction(j, k * steps))) for j in range(steps)]
    return [*points, 0]


@pytest.mark.parametrize("k", [1, 2, 4, 5, 8, 10])
def test_grid_is_the_published_rule_in_exact_integers(k):
    windows = Windows.uniform(k, 1000)
    for n in range(k, 60):
        assert windows.grid(n) == exact_grid(k, n)


def test_grid_where_floating_point_is_one_off():
    # As the published scheduler computes it: 0.25 - 3 * 0.05 is a little less than 0.1.
    assert (np.linspace(0.25, 0, 5, endpoint=False) * 1000).astype(int).tolist() == [250, 200, 150, 99, 49]
    assert Windows.uniform(4, 1000).grid(20)[15:] == [250, 200, 150, 100, 50, 0]


@pytest.mark.parametrize(
    "windows", [Windows.uniform(4, 1000), Windows.uniform(3, 1000), UNEVEN, Windows((980, 500, 20))]
)
def test_grid_falls_through_every_boundary(windows):
    for n in range(windows.num_windows, 40):
        grid = windows.grid(n)
        assert len(grid) == n + 1
        assert all(a > b for a, b in pairwise(grid))
        assert set(windows.boundaries) <= set(grid)
        assert grid[0] == windows.boundaries[0] and grid[-1] == windows.boundaries[-1]


@pytest.mark.parametrize(
    ("k", "n", "join", "grid"),
    [
        (4, 3, "noisy", [1000, 500, 250, 0]),
        (4, 3, "clean", [1000, 750, 500, 0]),
        (4, 2, "noisy", [1000, 500, 0]),
        (4, 2, "clean", [1000, 500, 0]),
        (4, 1, "clean", [1000, 0]),
        (8, 3, "noisy", [1000, 625, 250, 0]),
        (8, 3, "clean", [1000, 750, 375, 0]),
    ],
)
def test_fewer_steps_than_windows_join_them(k, n, join, grid):
    assert Windows.uniform(k, 1000).grid(n, join) == grid


def test_window_of_every_timestep():
    for windows in (Windows.uniform(4, 1000), UNEVEN):
        b = windows.boundaries
        expected = [next((s, e) for s, e in pairwise(b) if e < t <= s or t == e == b[-1]) for t in range(1001)]
        start, end = windows.of(torch.arange(1001))
        assert list(zip(start.tolist(), end.tolist(), strict=True)) == expected
        assert [windows.of(t) for t in (0, 1, 400, 401, 1000)] == [expected[t] for t in (0, 1, 400, 401, 1000)]
        assert [b[i] for i in windows.index(torch.arange(1001)).tolist()] == [s for s, _ in expected]


def test_of_keeps_the_shape():
    start, end = UNEVEN.of(torch.tensor([[5, 900], [901, 30]]))
    assert start.tolist() == [[30, 900], [1000, 30]]
    assert end.tolist() == [[0, 400], [900, 0]]


def test_span_is_the_window_of_the_step():
    windows = Windows.uniform(4, 1000)
    assert windows.span(1000, 750) == (1000, 750)
    assert windows.span(800, 760) == (1000, 750)
    assert windows.span(750, 700) == (750, 500)
    assert windows.span(1000, 600) == (1000, 500)
    assert windows.span(600, 250) == (750, 250)
    assert windows.span(1, 0) == (250, 0)


def test_every_step_of_a_grid_stays_in_one_window():
    windows = Windows.uniform(4, 1000)
    for n in range(4, 30):
        for t, t_next in pairwise(windows.grid(n)):
            assert windows.span(t, t_next) == windows.of(t)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Windows((0, 500, 1000)), "strictly falling"),
        (lambda: Windows((1000, 500, 500, 0)), "strictly falling"),
        (lambda: Windows((1000,)), "at least two"),
        (lambda: Windows((1000, -5)), ">= 0"),
        (lambda: Windows((1.0, 0.5, 0.0)), "expected integer timesteps"),
        (lambda: Windows.uniform(0, 1000), "0 windows between"),
        (lambda: Windows.uniform(11, 10), "11 windows between"),
        (lambda: UNEVEN.grid(0), "0 sampling steps; expected at least 1"),
        (lambda: UNEVEN.grid(125), "only 30 timesteps"),
        (lambda: UNEVEN.grid(3, "middle"), "`join='middle'`"),
        (lambda: UNEVEN.span(500, 500), "expected a falling one"),
        (lambda: UNEVEN.span(1001, 500), "expected a falling one"),
        (lambda: UNEVEN.of(1001), "expected 0 to 1000"),
        (lambda: UNEVEN.of(torch.tensor([3, -1])), "Timesteps from -1 to 3"),
    ],
)
def test_bad_windows_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
