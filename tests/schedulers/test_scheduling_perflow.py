"""PeRFlowScheduler's API and numbers, without a pipeline."""

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler

from closed_form import GaussianWorld
from perflow_diffusers.flow import PREDICTION_TYPES, Windows, euler
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler, PeRFlowSchedulerOutput


def make(prediction_type="ddim_eps", **options):
    return PeRFlowScheduler(prediction_type=prediction_type, **options)


def draw(dtype=torch.float64, batch=2, seed=0):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(scheduler, world, z, prediction_type="ddim_eps", first=0):
    """Sample with the ideal student from timesteps[first] on; returns the last state."""
    points = [*scheduler.timesteps.tolist(), scheduler.windows.boundaries[-1]]
    for t, t_next in list(pairwise(points))[first:]:
        start, end = scheduler.windows.span(t, t_next)
        out = world.student(z, t, start, end, prediction_type)
        z = scheduler.step(out, torch.tensor(t), z, return_dict=False)[0]
    return z


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_time_windows": 1},
        {"num_time_windows": 7},
        {"window_boundaries": [1000, 900, 300, 0]},
        {"t_noise": 0.98, "t_clean": 0.02},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True},
    ],
)
def test_an_ideal_student_lands_on_the_closed_form(prediction_type, options):
    scheduler = make(prediction_type, **options)
    world = GaussianWorld(scheduler.path)
    noisy, clean = scheduler.windows.boundaries[0], scheduler.windows.boundaries[-1]
    z = draw()
    for n in (7, 8, 13, 20):
        scheduler.set_timesteps(n)
        assert torch.allclose(run(scheduler, world, z, prediction_type), world.flow(z, noisy, clean), atol=1e-11)


def test_zero_terminal_snr_works_for_velocity_only():
    scheduler = make("velocity", rescale_betas_zero_snr=True)
    world = GaussianWorld(scheduler.path)
    scheduler.set_timesteps(6)
    assert torch.allclose(run(scheduler, world, draw(), "velocity"), world.flow(draw(), 1000, 0), atol=1e-12)
    for name in ("ddim_eps", "diff_eps"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            make(name, rescale_betas_zero_snr=True)


@pytest.mark.parametrize("k", [1, 4, 10])
def test_an_untouched_network_at_n_equal_k_is_ddim(k):
    """At the window starts the ddim_eps rule is DDIM's; only the network's timestep differs, by one."""
    scheduler = make(num_time_windows=k)
    ddim = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(k)
    ddim.set_timesteps(k)
    assert torch.equal(scheduler.timesteps - 1, ddim.timesteps)
    ours = theirs = draw(torch.float32)
    for t in scheduler.timesteps:
        mine = scheduler.step(ours.sin(), t, ours)
        stock = ddim.step(theirs.sin(), t - 1, theirs)
        assert torch.allclose(mine.pred_original_sample, stock.pred_original_sample, rtol=1e-4, atol=2e-4)
        ours, theirs = mine.prev_sample, stock.prev_sample
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [4, 8, 16])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=str
)
def test_numerics_against_float64(steps, dtype, bound):
    for prediction_type in PREDICTION_TYPES:
        scheduler = make(prediction_type)
        scheduler.set_timesteps(steps)
        outputs = [draw(dtype, seed=i + 1) for i in range(steps)]
        low, high = draw(dtype), draw(dtype).double()
        points = [*scheduler.timesteps.tolist(), 0]
        for out, (t, t_next) in zip(outputs, pairwise(points), strict=True):
            low = scheduler.step(out, torch.tensor(t), low, return_dict=False)[0]
            a, b = euler(scheduler.path, prediction_type, *scheduler.windows.of(t), t, t_next)
            high = a * high + b * out.double()
        assert low.dtype == dtype
        assert (low - high).norm() / high.norm() < bound


def test_img2img_from_any_timestep_lands_where_the_full_run_lands():
    """All data in one point, where the student's states are known for one noise: chord noising puts images there."""
    for options in ({}, {"window_boundaries": [1000, 900, 300, 0]}):
        scheduler = make(**options)
        world = GaussianWorld(scheduler.path, sigma0=0.0)
        noise, image = draw(), torch.full((2, 4, 8, 8), world.mu, dtype=torch.float64)
        for n in (4, 5, 11):
            scheduler.set_timesteps(n)
            full = run(scheduler, world, scheduler.add_noise(image, noise, scheduler.timesteps[:1]))
            for first in range(1, n):
                scheduler.set_timesteps(n)
                scheduler.set_begin_index(first)
                z = scheduler.add_noise(image, noise, scheduler.timesteps[first : first + 1].repeat(2))
                assert torch.allclose(run(scheduler, world, z, first=first), full, atol=1e-12)


def test_img2img_works_with_merged_windows_and_explicit_timesteps():
    scheduler = make()
    world = GaussianWorld(scheduler.path, sigma0=0.0)
    noise, image = draw(), torch.full((2, 4, 8, 8), world.mu, dtype=torch.float64)
    scheduler.set_timesteps(timesteps=[1000, 600, 300, 120])
    full = run(scheduler, world, scheduler.add_noise(image, noise, 1000))
    # 600 -> 300 follows the chord of the merged window 750..250, so this is where the run must be entered.
    scheduler.set_timesteps(timesteps=[1000, 600, 300, 120])
    scheduler.set_begin_index(1)
    entered = run(scheduler, world, scheduler.add_noise(image, noise, 600), first=1)
    final = scheduler.path.alpha[0] * world.mu + scheduler.path.sigma[0] * noise
    assert torch.allclose(full, final, atol=0.02)
    assert torch.allclose(entered, final, atol=0.02)


def test_add_noise_is_diffusion_on_boundaries_and_keeps_dtypes():
    scheduler = make()
    x0, noise = draw(), draw(seed=1)
    t = torch.tensor([1000, 250])
    assert torch.allclose(scheduler.add_noise(x0, noise, t), scheduler.path.add_noise(x0, noise, t), atol=1e-14)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        low = scheduler.add_noise(x0.to(dtype), noise.to(dtype), torch.tensor([600]))
        assert low.dtype == dtype and low.shape == x0.shape
        assert torch.allclose(low.double(), scheduler.add_noise(x0, noise, 600), atol=0.03)
    with pytest.raises(ValueError, match="expected 0 to 1000"):
        scheduler.add_noise(x0, noise, torch.tensor([1001]))


def test_timesteps_of_any_count():
    scheduler = make()
    for n in (*range(4, 30), 50, 1000):
        scheduler.set_timesteps(n)
        assert scheduler.timesteps.tolist() == Windows.uniform(4).grid(n)[:-1]
        assert len(scheduler.timesteps) == n == scheduler.num_inference_steps
        assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.min() == 1


def test_fewer_steps_than_windows_are_honoured_with_one_warning():
    scheduler = make()
    with pytest.warns(UserWarning, match="2 steps for weights with 4 time windows"):
        scheduler.set_timesteps(2)
    for n, timesteps in ((1, [1000]), (2, [1000, 500]), (3, [1000, 750, 500])):
        scheduler.set_timesteps(n)  # warnings are errors here: a second one would fail
        assert scheduler.timesteps.tolist() == timesteps
        assert len(scheduler.timesteps) == n == scheduler.num_inference_steps
        world = GaussianWorld(scheduler.path)
        assert torch.allclose(run(scheduler, world, draw()), world.flow(draw(), 1000, 0), atol=1e-12)


@pytest.mark.parametrize("as_type", [list, tuple, torch.tensor, lambda t: torch.tensor(t).numpy()])
def test_explicit_timesteps(as_type):
    scheduler = make()
    scheduler.set_timesteps(timesteps=as_type([1000, 750, 500, 250]), device="cpu")
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    world = GaussianWorld(scheduler.path)
    assert torch.allclose(run(scheduler, world, draw()), world.flow(draw(), 1000, 0), atol=1e-12)


def test_return_dict_is_the_fourth_argument_as_in_the_published_scheduler():
    scheduler = make()
    scheduler.set_timesteps(4)
    z = draw()
    assert type(scheduler.step(z, 1000, z, False)) is tuple


def test_step_leaves_its_arguments_alone():
    scheduler = make()
    for dtype in (torch.float64, torch.float32, torch.float16):
        scheduler.set_timesteps(4)
        z, out = draw(dtype), draw(dtype, seed=1)
        before = z.clone(), out.clone()
        scheduler.step(out, scheduler.timesteps[0], z)
        assert torch.equal(z, before[0]) and torch.equal(out, before[1])
        assert scheduler.scale_model_input(z, 5) is z


def test_step_is_differentiable():
    scheduler = make()
    scheduler.set_timesteps(4)
    z, out = draw(torch.float32).requires_grad_(), draw(torch.float32, seed=1).requires_grad_()
    scheduler.step(out, scheduler.timesteps[0], z).prev_sample.sum().backward()
    a, b = euler(scheduler.path, "ddim_eps", 1000, 750, 1000, 750)
    assert torch.allclose(z.grad, torch.full_like(z, a.item()))
    assert torch.allclose(out.grad, torch.full_like(z, b.item()))


def test_output_forms():
    scheduler = make()
    scheduler.set_timesteps(4)
    z = draw()
    full = scheduler.step(z, 1000, z, generator=torch.Generator())
    assert isinstance(full, PeRFlowSchedulerOutput)
    assert full[0] is full.prev_sample and full["pred_original_sample"] is full.pred_original_sample
    short = scheduler.step(z, 1000, z, return_dict=False)
    assert isinstance(short, tuple) and len(short) == 1 and torch.equal(short[0], full.prev_sample)


def test_constants_and_tables_that_pipelines_read():
    scheduler = make()
    ddim = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False)
    assert (scheduler.init_noise_sigma, scheduler.order, len(scheduler)) == (1.0, 1, 1000)
    assert torch.equal(scheduler.alphas_cumprod, ddim.alphas_cumprod)
    assert scheduler.final_alpha_cumprod == ddim.final_alpha_cumprod
    assert DDIMScheduler in scheduler.compatibles
    assert scheduler.timesteps.tolist() == list(range(1000, 0, -1))


def test_a_deep_copy_is_independent():
    scheduler = make()
    scheduler.set_timesteps(4)
    twin = copy.deepcopy(scheduler)
    scheduler.set_timesteps(8)
    assert len(twin.timesteps) == 4
    z = draw()
    assert torch.equal(twin.step(z, 1000, z).prev_sample, make_step(4, z))


def make_step(n, z):
    scheduler = make()
    scheduler.set_timesteps(n)
    return scheduler.step(z, 1000, z).prev_sample


def test_nothing_is_said_in_normal_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = make()
        scheduler.set_timesteps(4)
        scheduler.step(draw(), 1000, draw())
