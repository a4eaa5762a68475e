"""The parameterisations against the closed form, the paper's table and each other."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from closed_form import GaussianWorld
from perflow_diffusers.flow import (
    PREDICTION_TYPES,
    NoisePath,
    Windows,
    clean_estimate,
    coefficients,
    euler,
    interpolate,
    marginal,
    target,
)

SD = NoisePath.from_betas()
ZERO_SNR = NoisePath.from_betas(rescale_betas_zero_snr=True)
WINDOWS = {"uniform": Windows.uniform(4, 1000), "uneven": Windows((1000, 870, 400, 60, 0)), "one": Windows.uniform(1)}
PATHS_AND_TYPES = [
    *((SD, name) for name in PREDICTION_TYPES),
    (NoisePath.from_betas(beta_schedule="squaredcos_cap_v2", set_alpha_to_one=True), "ddim_eps"),
    (NoisePath.from_betas(beta_schedule="squaredcos_cap_v2", set_alpha_to_one=True), "diff_eps"),
    (ZERO_SNR, "velocity"),
    (NoisePath.straight(1000), "velocity"),
]


def column(c):
    return c.reshape(-1, 1, 1, 1)


def draw(batch=3):
    return torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sample(world, windows, name, z, grid):
    """The run of an ideal student over a grid."""
    for t, t_next in pairwise(grid):
        start, end = windows.span(t, t_next)
        a, b = euler(world.path, name, start, end, t, t_next)
        z = a * z + b * world.student(z, t, start, end, name)
    return z


def test_coefficients_are_those_of_the_paper():
    bar = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod.tolist()
    s, e = bar[749], bar[499]
    lam = math.sqrt(e / s)
    g = math.sqrt(s / e)
    expected = {
        "ddim_eps": (lam, math.sqrt(1 - e) - lam * math.sqrt(1 - s)),
        "diff_eps": (1 / g, -math.sqrt(1 - g * g) / g),
        "velocity": (1, -0.25),
    }
    for name, pair in expected.items():
        assert [c.item() for c in coefficients(SD, name, 750, 500)] == pytest.approx(pair, rel=1e-12)


@pytest.mark.parametrize(("path", "name"), PATHS_AND_TYPES)
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_an_ideal_student_lands_on_the_closed_form(path, name, windows):
    world = GaussianWorld(path)
    z = draw()
    # The cosine schedule ends at alpha = 5e-5: lambda multiplies rounding errors by 1e4.
    atol = 2e-13 if name == "velocity" or path.alpha[-1] > 0.01 else 1e-10
    for n in (*range(windows.num_windows, 10), 20, 37):
        grid = windows.grid(n)
        # Every boundary on the way, not only the end.
        for boundary in windows.boundaries[1:]:
            landed = sample(world, windows, name, z, grid[: grid.index(boundary) + 1])
            assert torch.allclose(landed, world.flow(z, 1000, boundary), atol=atol, rtol=0)


def test_a_step_over_joined_windows_is_the_step_of_the_wide_window():
    world = GaussianWorld(SD)
    windows = WINDOWS["uniform"]
    for n, join in ((1, "noisy"), (2, "noisy"), (3, "noisy"), (3, "clean")):
        landed = sample(world, windows, "ddim_eps", draw(), windows.grid(n, join))
        assert torch.allclose(landed, world.flow(draw(), 1000, 0), atol=2e-13, rtol=0)


@pytest.mark.parametrize(("path", "name"), PATHS_AND_TYPES)
def test_target_chord_point_and_step_close_the_circle(path, name):
    """Per-sample windows in one batch: any z_s, z_e; the target at any point leads to z_e and back to z_s."""
    start, end = torch.tensor([1000, 750, 500, 250]), torch.tensor([750, 500, 250, 0])
    t = torch.tensor([1000, 501, 333, 7])
    z_s, z_e = draw(4), draw(8)[4:]
    z_t = interpolate(z_s, z_e, start, end, t)
    out = target(path, name, z_s, z_e, start, end)
    for to, expected in ((end, z_e), (start, z_s), (t, z_t)):
        a, b = euler(path, name, start, end, t, to)
        assert torch.allclose(column(a) * z_t + column(b) * out, expected, atol=1e-11)
    u = column((start - t) / (start - end))
    assert torch.allclose(z_t, (1 - u) * z_s + u * z_e, atol=1e-7)


def test_target_of_a_batch_equals_one_by_one_in_float32():
    start, end = torch.tensor([1000, 750, 250]), torch.tensor([750, 500, 0])
    z_s, z_e = draw().float(), draw(6)[3:].float()
    for name in PREDICTION_TYPES:
        batch = target(SD, name, z_s, z_e, start, end)
        assert batch.dtype == torch.float32
        for i in range(3):
            one = target(SD, name, z_s[i : i + 1], z_e[i : i + 1], int(start[i]), int(end[i]))
            assert torch.equal(one, batch[i : i + 1])


def test_targets_of_a_closed_form_solve_are_the_ideal_outputs():
    world = GaussianWorld(SD)
    start, end, t = torch.tensor([1000, 750, 250]), torch.tensor([750, 500, 0]), torch.tensor([900, 750, 3])
    z_s = draw()
    z_e = world.flow(z_s, start, end)
    z_t = interpolate(z_s, z_e, start, end, t)
    for name in PREDICTION_TYPES:
        ideal = world.student(z_t, t, start, end, name)
        assert torch.allclose(target(SD, name, z_s, z_e, start, end), ideal, atol=1e-12)


def test_velocity_is_the_plain_euler_step():
    a, b = euler(SD, "velocity", 750, 500, 700, 600)
    assert a.item() == 1 and b.item() == pytest.approx(-0.1, abs=1e-15)


def test_marginal_is_diffusion_on_boundaries_and_linear_between():
    for s, e in pairwise(WINDOWS["uneven"].boundaries):
        for t in (s, e):
            assert [c.item() for c in marginal(SD, s, e, t)] == pytest.approx([c.item() for c in SD.at(t)], abs=1e-15)
        half = [c.item() for c in marginal(SD, s, e, (s + e) // 2)]
        u = (s - (s + e) // 2) / (s - e)
        mean = [((1 - u) * p + u * q).item() for p, q in zip(SD.at(s), SD.at(e), strict=True)]
        assert half == pytest.approx(mean, abs=1e-14)
    # Inside the first window the two differ: this is the published scheduler's error.
    assert abs(marginal(SD, 1000, 750, 875)[0] - SD.at(875)[0]) > 0.01


def test_marginal_is_where_a_point_mass_travels():
    world = GaussianWorld(SD, mu=0.7, sigma0=0.0)
    noise = draw()
    for t in (1000, 990, 801, 750, 130, 1):
        start, end = WINDOWS["uniform"].of(t)
        c_x0, c_noise = marginal(SD, start, end, t)
        assert torch.allclose(c_x0 * 0.7 + c_noise * noise, world.chord_point(noise, start, end, t), atol=1e-14)


def test_marginal_has_the_mean_of_the_student_states_and_nearly_their_spread():
    """Data with spread: the mean is exact at every t; the spread is, for narrow data, nearer than that of diffusion.

    (Data as wide as the noise keep their spread on diffusion's marginal and lose up to 2 % of it on the chord.)
    """
    for start, end in ((1000, 750), (750, 500), (500, 250)):
        t = (start + end) // 2
        c_x0, c_noise = marginal(SD, start, end, t)
        for sigma0 in (0.1, 1.0):
            world = GaussianWorld(SD, sigma0=sigma0)
            assert c_x0 * world.mu == pytest.approx((world.mean(start) + world.mean(end)).item() / 2, abs=1e-14)
            spread = (world.spread(start) + world.spread(end)).item() / 2
            off_chord = abs(math.hypot(c_x0 * sigma0, c_noise) - spread)
            if sigma0 == 0.1:
                assert off_chord < 0.05 * abs(world.spread(t).item() - spread)
            assert off_chord < 0.022 * spread


def test_clean_estimate_of_ddim_eps_is_exact_on_the_chord():
    x0, eps = draw(), draw(6)[3:]
    for start, end, t in ((1000, 750, 1000), (750, 500, 612), (250, 0, 1)):
        c_x0, c_noise = marginal(SD, start, end, t)
        p, q = clean_estimate(SD, "ddim_eps", start, end, t)
        assert torch.allclose(p * (c_x0 * x0 + c_noise * eps) + q * eps, x0, atol=1e-12)


def test_clean_estimate_is_the_same_for_every_parameterisation():
    world = GaussianWorld(SD)
    for start, end, t in ((1000, 750, 1000), (750, 500, 612), (250, 0, 1)):
        z = draw()
        estimates = []
        for name in PREDICTION_TYPES:
            p, q = clean_estimate(SD, name, start, end, t)
            estimates.append(p * z + q * world.student(z, t, start, end, name))
        assert torch.allclose(estimates[0], estimates[1], atol=1e-11)
        assert torch.allclose(estimates[0], estimates[2], atol=1e-11)


def test_clean_estimate_on_the_straight_path_is_z_minus_sigma_v():
    p, q = clean_estimate(NoisePath.straight(1000), "velocity", 750, 500, 600)
    assert (p.item(), q.item()) == pytest.approx((1, -0.6), abs=1e-14)


def test_clean_estimate_with_zero_terminal_snr_and_in_a_window_of_one_noise_level():
    p, q = clean_estimate(ZERO_SNR, "velocity", 1000, 750, 1000)
    assert math.isfinite(p) and math.isfinite(q)
    p, q = clean_estimate(SD, "ddim_eps", 1, 0, 1)
    assert p.item() == pytest.approx(1 / SD.alpha[0].item()) and q.item() == 0


@pytest.mark.parametrize(
    ("path", "name", "words"),
    [
        (SD, "epsilon", "what the base model predicts.*Pass one of ddim_eps, diff_eps, velocity"),
        (SD, "v_prediction", "what the base model predicts"),
        (SD, "eps", "`prediction_type='eps'` is unknown"),
        (SD, None, "was not given"),
        (ZERO_SNR, "ddim_eps", "zero terminal SNR"),
        (ZERO_SNR, "diff_eps", "zero terminal SNR"),
        (NoisePath.straight(10), "ddim_eps", "zero terminal SNR"),
    ],
)
def test_undefined_parameterisations_are_refused(path, name, words):
    with pytest.raises(ValueError, match=words):
        coefficients(path, name, 8, 4)
