"""The solvers against the closed form (orders of convergence) and diffusers' own solvers."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LMSDiscreteScheduler

from closed_form import GaussianWorld
from perflow_diffusers.flow import METHODS, NoisePath, solve
from perflow_diffusers.flow.solver import SPACINGS

SD = NoisePath.from_betas()
SMOOTH = NoisePath.from_alphas_cumprod(torch.cos(torch.linspace(0, 1.5, 4097, dtype=torch.float64)[1:]) ** 2)
ORDERS = {"ddim": 1, "dpmpp_2m": 2, "deis": 2, "heun": 2}
STARTS, ENDS = torch.tensor([3072, 2048, 1024]), torch.tensor([1024, 1024, 512])


def draw(batch=3):
    return torch.randn(batch, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def predicting(world, prediction):
    return lambda z, t: world.teacher(z, t, prediction)


def errors_of(path, method, prediction, reference, spacing="time"):
    """Errors (3,) of three windows in one batch with 32, 64 and 128 steps."""
    predict = predicting(GaussianWorld(path), prediction)
    for steps in (32, 64, 128):
        z_end = solve(predict, path, draw(), STARTS, ENDS, steps, method, prediction, spacing)
        yield (z_end - reference).abs().amax(dim=(1, 2, 3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("path", [SMOOTH, NoisePath.straight(4096)], ids=["diffusion", "straight"])
@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence_to_the_closed_form(path, method, prediction):
    if path.zero_terminal_snr and prediction == "epsilon":
        prediction = "flow"
    exact = GaussianWorld(path).flow(draw(), STARTS, ENDS)
    for coarse, fine in pairwise(errors_of(path, method, prediction, exact)):
        assert torch.allclose((coarse / fine).log2(), torch.full((3,), float(ORDERS[method])).double(), atol=0.16)


FINE = NoisePath.from_alphas_cumprod(torch.cos(torch.linspace(0, 1.5, 65537, dtype=torch.float64)[1:]) ** 2)


def solved_finely(steps, method, spacing):
    predict = predicting(GaussianWorld(FINE), "v_prediction")
    start, end = torch.tensor([49152, 32768]), torch.tensor([32768, 16384])
    return solve(predict, FINE, draw(2), start, end, steps, method, "v_prediction", spacing)


@pytest.fixture(scope="module")
def thousand_steps():
    return solved_finely(1000, "heun", "time")


@pytest.mark.parametrize("method", METHODS)
def test_order_of_convergence_to_a_thousand_steps(method, thousand_steps):
    """The same against a reference that knows no closed form, on steps of equal log signal-to-noise ratio."""
    errors = [(solved_finely(steps, method, "log_snr") - thousand_steps).norm() for steps in (8, 16, 32)]
    for coarse, finer in pairwise(errors):
        assert abs(float((coarse / finer).log2()) - ORDERS[method]) < 0.25


def test_steps_of_equal_log_snr_are_the_nearest_timesteps():
    told = []
    solve(lambda z, t: told.append(t.tolist()) or z, SD, draw(2), torch.tensor([1000, 250]), torch.tensor([750, 0]), 4,
          spacing="log_snr")  # fmt: skip
    rate = SD.alpha.log() - SD.sigma.log()
    for column, (start, end) in enumerate([(1000, 750), (250, 0)]):
        for j in range(4):
            wanted = rate[start] + (rate[end] - rate[start]) * j / 4
            assert told[j][column] == int((rate[1:] - wanted).abs().argmin()) + 1


@pytest.mark.parametrize("path", [SD, NoisePath.straight(1000), NoisePath.from_betas(rescale_betas_zero_snr=True)])
def test_every_step_moves_however_narrow_the_window(path):
    told = []
    for start, end in ((1000, 988), (12, 0), (1000, 0)):
        told.clear()
        solve(
            lambda z, t: told.append(int(t[0])) or z, path, draw(1), start, end, 12, "ddim", "v_prediction", "log_snr"
        )
        assert told[0] == start
        assert all(a > b for a, b in pairwise([*told, end]))


def test_dpmpp_2m_needs_half_the_evaluations_of_ddim():
    """In every window of SD's schedule: 4 steps of equal log SNR are nearer than 8 of DDIM, the paper's solver."""
    world = GaussianWorld(SD)
    for start in (1000, 750, 500, 250):
        exact = world.flow(draw(), start, start - 250)
        ddim, ours = (
            (solve(world.teacher, SD, draw(), start, start - 250, steps, name, spacing=spacing) - exact).norm()
            for steps, name, spacing in ((8, "ddim", "time"), (4, "dpmpp_2m", "log_snr"))
        )
        assert ours < ddim


@pytest.mark.parametrize("method", METHODS)
def test_windows_of_the_real_schedule(method):
    """Eight steps a window on SD's schedule; the clean end is the stiff one."""
    world = GaussianWorld(SD)
    start, end = torch.tensor([1000, 750, 500]), torch.tensor([750, 500, 250])
    error = solve(world.teacher, SD, draw(), start, end, 8, method) - world.flow(draw(), start, end)
    assert error.abs().max() < {"ddim": 1.1e-2, "dpmpp_2m": 1.5e-3, "deis": 2e-3, "heun": 4.5e-4}[method]
    error = solve(world.teacher, SD, draw(), 250, 0, 8, method) - world.flow(draw(), 250, 0)
    assert error.abs().max() < {"ddim": 0.16, "dpmpp_2m": 0.09, "deis": 0.04, "heun": 0.008}[method]


@pytest.mark.parametrize("method", METHODS)
def test_all_base_predictions_lead_to_one_state(method):
    world = GaussianWorld(SD)
    ends = [
        solve(predicting(world, name), SD, draw(), 750, 500, 5, method, name)
        for name in ("epsilon", "sample", "v_prediction", "flow")
    ]
    for other in ends[1:]:
        assert torch.allclose(ends[0], other, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", [SD, NoisePath.from_betas(set_alpha_to_one=True)], ids=["sd", "to one"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_batch_of_windows_equals_one_by_one(method, path, spacing):
    world = GaussianWorld(path)
    start, end = torch.tensor([1000, 250, 500]), torch.tensor([750, 0, 250])
    batch = solve(world.teacher, path, draw(), start, end, 6, method, spacing=spacing)
    for i in range(3):
        one = solve(world.teacher, path, draw()[i : i + 1], int(start[i]), int(end[i]), 6, method, spacing=spacing)
        assert torch.allclose(one, batch[i : i + 1], atol=1e-14)
    assert batch.isfinite().all()


@pytest.mark.parametrize(("method", "evaluations"), [("ddim", 8), ("dpmpp_2m", 8), ("deis", 8), ("heun", 16)])
def test_the_network_is_told_the_exact_grid(method, evaluations):
    told = []

    def predict(z, timestep):
        told.append(timestep.tolist())
        return z

    solve(predict, SD, draw(2), torch.tensor([1000, 750]), torch.tensor([750, 500]), 8, method)
    grid = [[(s * 8 - 250 * j) // 8 for s in (1000, 750)] for j in range(9)]
    assert len(told) == evaluations
    assert told == (grid[:-1] if evaluations == 8 else [t for pair in pairwise(grid) for t in pair])
    assert grid[2] == [937, 687]


def test_timestep_zero_is_never_told():
    told = []

    def predict(z, timestep):
        told.append(timestep.min().item())
        return z

    for path in (SD, NoisePath.from_betas(set_alpha_to_one=True)):
        solve(predict, path, draw(2), torch.tensor([250, 500]), torch.tensor([0, 250]), 4, "heun")
    assert min(told) == 1


def test_ddim_is_diffusers_ddim():
    ddim = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    ddim.set_timesteps(10)
    z = expected = draw().float()
    for t in ddim.timesteps:
        expected = ddim.step(expected.sin(), t, expected).prev_sample
    ours = solve(lambda z, t: z.sin(), SD, z, 1000, 0, 10)
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_dpmpp_2m_is_diffusers_dpm_solver():
    dpm = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        final_sigmas_type="sigma_min",
        lower_order_final=True,
    )
    dpm.set_timesteps(10)
    z = expected = draw()
    for t in dpm.timesteps:
        expected = dpm.step(expected.sin(), t, expected).prev_sample
    ours = solve(lambda z, t: z.sin(), SD, z, 1000, 0, 10, "dpmpp_2m")
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_deis_is_diffusers_linear_multistep():
    """Order 2 in sigma / alpha, on z / alpha; the last step is left out, for diffusers goes on to no noise at all."""
    lms = LMSDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
    )
    lms.set_timesteps(10)
    x = draw() * SD.sigma[1000] / SD.alpha[1000]
    for i, t in enumerate(lms.timesteps[:-1]):
        alpha = SD.alpha[1000 - 100 * i]
        lms.is_scale_input_called = True
        x = lms.step((x * alpha).sin(), t, x, order=2).prev_sample
    ours = solve(lambda z, t: z.sin(), SD, draw() * SD.sigma[1000], 1000, 100, 9, "deis")
    assert torch.allclose(ours, x * SD.alpha[100], rtol=1e-3, atol=1e-3)


def test_ddim_on_the_straight_path_is_euler_in_sigma():
    z = expected = draw()
    for _ in range(5):
        expected = expected + (-0.05) * expected.cos()
    ours = solve(lambda z, t: z.cos(), NoisePath.straight(1000), z, 750, 500, 5, "ddim", "flow")
    assert torch.allclose(ours, expected, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_from_pure_noise_to_clean_data_on_the_straight_path(method):
    """Both ends are singular in log(alpha / sigma); the result must stay finite and near the closed form."""
    path = NoisePath.straight(1000)
    world = GaussianWorld(path)
    error = solve(predicting(world, "flow"), path, draw(), 1000, 0, 50, method, "flow") - world.flow(draw(), 1000, 0)
    assert error.abs().max() < {"ddim": 0.05, "dpmpp_2m": 0.01, "deis": 0.005, "heun": 0.001}[method]


def test_dtype_is_kept_and_float32_is_accurate():
    world = GaussianWorld(SD)
    for method in METHODS:
        exact = solve(world.teacher, SD, draw(), 750, 500, 8, method)
        single = solve(world.teacher, SD, draw().float(), 750, 500, 8, method)
        assert single.dtype == torch.float32
        assert math.isclose((single - exact).abs().max().item(), 0, abs_tol=5e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "euler"}, "`method='euler'`; expected one of ddim"),
        ({"steps": 0}, "`steps=0`"),
        ({"steps": 251}, "window of 250 timesteps; expected 1 to 250"),
        ({"start": 500}, "expected 1000 >= start > end >= 0"),
        ({"start": torch.tensor([750, 1001])}, "expected 1000 >= start"),
        ({"end": -1}, "expected 1000 >= start"),
        ({"prediction": "noise"}, "`prediction='noise'`"),
        ({"spacing": "karras"}, "`spacing='karras'`; expected one of time, log_snr"),
    ],
)
def test_bad_arguments_are_refused(change, words):
    arguments = {"start": 750, "end": 500, "steps": 4, **change}
    with pytest.raises(ValueError, match=words):
        solve(lambda z, t: z, SD, draw(2), **arguments)
