"""The objective against the world where everything is known (tests/closed_form.py)."""

import pytest
import torch

from closed_form import GaussianWorld
from perflow_diffusers.flow import NoisePath, Windows, coefficients
from perflow_training.buffer import SolvedWindows
from perflow_training.config import TrainingConfig
from perflow_training.objective import (
    Loss,
    Solver,
    draw_timesteps,
    guidance_of,
    measure_window_costs,
    sample_weights,
    solve_from_data,
    solve_trajectories,
    student_loss,
)
from perflow_training.teacher.backbone import Backbone
from perflow_training.teacher.conditions import Conditions

PATH = NoisePath.from_betas()
WORLD = GaussianWorld(PATH)
WINDOWS = Windows.uniform(4, 1000)
COND = Conditions({"encoder_hidden_states": torch.zeros(16, 1, 1, dtype=torch.float64)})


class GaussianNetwork(torch.nn.Module):
    """The closed form's teacher as a network that, like SD's, is told timesteps 0..999."""

    def forward(self, z, timestep, encoder_hidden_states, return_dict):
        return (WORLD.teacher(z, timestep + 1),)


TEACHER = Backbone(GaussianNetwork(), PATH, "epsilon", index_offset=-1)


def config(**options):
    return TrainingConfig(**{"solver": "heun", "solver_spacing": "time", "solver_steps": 200, **options})


def noise(seed=0):
    return torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(**options):
    return solve_trajectories(TEACHER, WINDOWS, Solver.of(config(**options)), noise(), COND, COND[:1])


def test_trajectories_follow_the_closed_form_from_window_to_window():
    windows = solved()
    assert windows.start.tolist() == [t for t in (1000, 750, 500, 250) for _ in range(16)]
    assert windows.end.tolist() == [t for t in (750, 500, 250, 0) for _ in range(16)]
    assert torch.equal(windows.z_start[16:], windows.z_end[:-16])
    exact = WORLD.flow(windows.z_start, windows.start, windows.end)
    assert (windows.z_end - exact).abs().max() < 2e-3
    coarse = solved(solver_steps=50)
    errors = [(w.z_end[-16:] - WORLD.flow(noise(), 1000, 0)).norm() for w in (coarse, windows)]
    assert errors[1] < errors[0] / 8  # second order: a quarter of the step, near a sixteenth of the error


def test_windows_from_data_start_on_the_diffusion_marginal():
    latents, eps = noise(1), noise(2)
    number = torch.tensor([0, 1, 2, 3] * 4)
    windows = solve_from_data(TEACHER, WINDOWS, Solver.of(config()), latents, eps, number, COND, COND[:1])
    assert windows.start.tolist() == [1000, 750, 500, 250] * 4
    assert torch.equal(windows.start - windows.end, torch.full((16,), 250))
    abar = PATH.alpha[windows.start].reshape(-1, 1, 1, 1) ** 2
    torch.testing.assert_close(windows.z_start, abar.sqrt() * latents + (1 - abar).sqrt() * eps, rtol=0, atol=1e-9)
    assert (windows.z_end - WORLD.flow(windows.z_start, windows.start, windows.end)).abs().max() < 2e-3


@pytest.mark.parametrize("prediction_type", ["ddim_eps", "diff_eps", "velocity"])
def test_the_ideal_student_has_no_loss_anywhere_in_a_window(prediction_type):
    starts = torch.tensor([1000, 750, 500, 250] * 4)
    ends = starts - 250
    z_start = WORLD.mean(starts).reshape(-1, 1, 1, 1) + WORLD.spread(starts).reshape(-1, 1, 1, 1) * noise()
    exact = SolvedWindows(z_start, WORLD.flow(z_start, starts, ends), starts, ends, COND)
    for back in (0, 1, 100, 249):
        losses = student_loss(
            lambda z, t, cond: WORLD.student(z, t, starts, ends, prediction_type),
            PATH,
            exact,
            starts - back,
            Loss(prediction_type),
            torch.ones(16),
        )
        assert losses.max() < 1e-10


def test_loss_of_a_wrong_student_is_its_squared_error_times_the_weight():
    windows = solved()
    right = WORLD.student(windows.z_start, windows.start, windows.start, windows.end, "ddim_eps")
    weights = torch.arange(1, len(windows) + 1, dtype=torch.float64)
    exact = SolvedWindows(
        windows.z_start,
        WORLD.flow(windows.z_start, windows.start, windows.end),
        windows.start,
        windows.end,
        windows.cond,
    )
    off = torch.linspace(-1, 1, 256, dtype=torch.float64).reshape(4, 8, 8)
    losses = student_loss(lambda *_: right + off, PATH, exact, windows.start, Loss("ddim_eps"), weights)
    torch.testing.assert_close(losses, weights * off.pow(2).mean(), rtol=1e-5, atol=1e-6)
    huber = student_loss(
        lambda *_: right + off, PATH, exact, windows.start, Loss("ddim_eps", "pseudo_huber", 0.5), weights
    )
    torch.testing.assert_close(huber, weights * ((off.pow(2).mean() + 0.25).sqrt() - 0.5), rtol=1e-5, atol=1e-6)


def test_measured_window_weights_are_the_flow_s_amplification():
    """An error d in eps at window k is eta_k d at its end and eta_k d s_0 / s_e in the final latent."""
    world_student = Backbone(_Off(), PATH, "epsilon")
    final, loss = measure_window_costs(
        world_student, TEACHER, WINDOWS, Solver.of(config(solver_steps=200)), Loss("ddim_eps"), noise(), COND, COND[:1]
    )
    weights = final / loss
    weights = weights / weights.mean()
    wanted = torch.stack(
        [
            (coefficients(PATH, "ddim_eps", s, e)[1] * WORLD.spread(0) / WORLD.spread(e)) ** 2
            for s, e in ((1000, 750), (750, 500), (500, 250), (250, 0))
        ]
    )
    torch.testing.assert_close(weights.double(), wanted / wanted.mean(), rtol=2e-2, atol=1e-3)


class _Off(torch.nn.Module):
    """The ideal student at window starts, wrong by a constant."""

    def forward(self, z, timestep, encoder_hidden_states, return_dict):
        start = int(timestep[0])
        return (WORLD.student(z, timestep, start, start - 250, "ddim_eps") + 0.3,)


def drawn(start, end, starts, grid, discrete=None):
    uniform = torch.rand(3, len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return draw_timesteps(start, end, uniform, starts, grid, discrete)


def test_timesteps_are_drawn_where_sampling_happens():
    start = torch.full((40000,), 750)
    end = torch.full((40000,), 500)
    assert torch.equal(drawn(start, end, 1.0, 0.0), start)
    grid = drawn(start, end, 0.0, 1.0)
    assert set(grid.tolist()) == {750, 625}
    uniform = drawn(start, end, 0.0, 0.0)
    assert (uniform.min(), uniform.max()) == (501, 750)
    assert abs(float(uniform.double().mean()) - 625.5) < 2
    mixed = drawn(start, end, 0.5, 0.3)
    # 0.5 on the start, half of 0.3 there by the grid, 0.2 / 250 by chance
    assert abs(float((mixed == 750).double().mean()) - (0.5 + 0.15 + 0.2 / 250)) < 0.01
    assert abs(float((mixed == 625).double().mean()) - (0.15 + 0.2 / 250)) < 0.01


def test_discrete_timesteps_are_the_published_grid():
    """1, 1 - 1/40, ...: in the window from 750 to 500 ten points, each as likely as the others."""
    points = drawn(torch.full((40000,), 750), torch.full((40000,), 500), 0.0, 0.0, (40, 1000))
    values, counts = points.unique(return_counts=True)
    assert values.tolist() == list(range(525, 751, 25))
    assert (counts / 40000 - 0.1).abs().max() < 0.01
    uneven = drawn(torch.full((4000,), 610), torch.full((4000,), 100), 0.0, 0.0, (40, 1000))
    assert (int(uneven.min()), int(uneven.max())) == (125, 610)


def test_published_reweightings():
    """1 / clamp(1 - t, 0.1) / 2.3, and the window's start over (1 + K) / 2K."""
    start, timestep = torch.tensor([1000, 750, 500, 250]), torch.tensor([1000, 700, 400, 1])
    got = sample_weights("reciprocal", WINDOWS, start, timestep, 1000)
    torch.testing.assert_close(got, 1 / torch.tensor([0.1, 0.3, 0.6, 0.999]) / 2.3)
    got = sample_weights("rcp_win", WINDOWS, start, timestep, 1000)
    torch.testing.assert_close(got, torch.tensor([1, 0.75, 0.5, 0.25]) / (5 / 8))
    assert sample_weights("none", WINDOWS, start, timestep, 1000).tolist() == [1, 1, 1, 1]


def test_first_window_starts_on_pure_noise_if_asked():
    windows = solve_from_data(
        TEACHER, WINDOWS, Solver.of(config(solver_steps=2)), noise(1), noise(2), torch.tensor([0, 1] * 8), COND,
        COND[:1], zero_snr=True,
    )  # fmt: skip
    assert torch.equal(windows.z_start[::2], noise(2)[::2])
    assert torch.equal(windows.z_start[1::2], PATH.add_noise(noise(1), noise(2), 750)[1::2])


def test_guidance_comes_from_the_range():
    uniform = torch.tensor([0.0, 0.5, 1.0])
    assert guidance_of([5.0, 9.0], uniform).tolist() == [5, 7, 9]
    assert guidance_of(7.5, uniform) == 7.5
    assert guidance_of(1.0, uniform) is None
    assert guidance_of(None, uniform) is None


def test_guidance_is_the_classifier_free_combination():
    class Sees(torch.nn.Module):
        def forward(self, z, timestep, encoder_hidden_states, return_dict):
            return (z * 0 + encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1),)

    backbone = Backbone(Sees(), PATH, "epsilon")
    cond, uncond = (
        Conditions({"encoder_hidden_states": torch.tensor(v).reshape(-1, 1, 1)}) for v in ([1.0, 2.0], [0.5])
    )
    z, timestep = torch.zeros(2, 4, 2, 2), torch.tensor([10, 20])
    out = backbone.guided(uncond, cond, 7.5)(z, timestep)
    torch.testing.assert_close(out[:, 0, 0, 0], 0.5 + 7.5 * (torch.tensor([1.0, 2.0]) - 0.5))
    each = backbone.guided(uncond, cond, torch.tensor([2.0, 3.0]))(z, timestep)
    torch.testing.assert_close(each[:, 0, 0, 0], torch.tensor([1.5, 5.0]))
    plain = backbone.guided(uncond, cond, None)(z, timestep)
    torch.testing.assert_close(plain[:, 0, 0, 0], torch.tensor([1.0, 2.0]))
