"""FlowMatchPeRFlowScheduler beside diffusers' FlowMatchEulerDiscreteScheduler: the same steps on the windows' grid."""

import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

from perflow_diffusers import FlowMatchPeRFlowScheduler
from perflow_diffusers.schedulers import combine


def ours(**options):
    return FlowMatchPeRFlowScheduler(**{"shift": 3.0, "num_time_windows": 4, **options})


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(scheduler, z, outputs, **options):
    states = []
    for t, out in zip(scheduler.timesteps, outputs, strict=True):
        z = scheduler.step(out, t, z, return_dict=False, **options)[0]
        states.append(z)
    return states


def stock_on(scheduler):
    """Stock Euler told the levels of a run, without a shift of its own."""
    stock = FlowMatchEulerDiscreteScheduler(shift=1.0)
    stock.set_timesteps(sigmas=scheduler.sigmas[:-1].tolist())
    return stock


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 64, 16), (1, 4, 3, 8, 8), (3, 5)])
@pytest.mark.parametrize("steps", [1, 2, 4, 6, 9])
@pytest.mark.filterwarnings("ignore:.*windows are merged")
def test_steps_are_those_of_stock_euler_to_the_last_bit(shape, steps):
    scheduler = ours()
    scheduler.set_timesteps(steps)
    stock = stock_on(scheduler)
    assert torch.equal(scheduler.timesteps, stock.timesteps) and torch.equal(scheduler.sigmas, stock.sigmas)
    outputs = [random(*shape, seed=i) for i in range(steps)]
    z = random(*shape, seed=99)
    for mine, theirs in zip(run(scheduler, z, outputs), run(stock, z, outputs), strict=True):
        assert torch.equal(mine, theirs)


def test_the_grid_of_the_windows_is_the_shifted_one_without_its_small_last_level():
    scheduler = ours()
    scheduler.set_timesteps(8)
    wanted = [3 * u / (1 + 2 * u) for u in np.linspace(1, 0, 9)]
    assert scheduler.sigmas.tolist() == pytest.approx(wanted, abs=1e-7) and scheduler.sigmas[-1] == 0
    assert scheduler.timesteps.dtype == torch.float32
    assert torch.equal(scheduler.timesteps, scheduler.sigmas[:-1] * 1000)


DEFAULTS = {  # what diffusers' pipelines pass by themselves, n = 6
    "to 1 / n": np.linspace(1.0, 1 / 6, 6),
    "to 0, without it": np.linspace(1.0, 0.0, 7)[:-1],
    "from .999": np.linspace(0.999, 0.0, 7)[:-1],
    "a list": torch.linspace(1.0, 1 / 6, 6).tolist(),
    "linear, then quadratic": np.array(linear_quadratic_schedule(6, 0.025)),
    "to the last timestep": np.linspace(1000, 1, 6).astype(np.int64) / 1000,
}


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("mu", [None, 0.7])
def test_the_even_grid_of_a_pipeline_gives_way_to_the_windows(name, mu):
    scheduler, wanted = ours(), ours()
    scheduler.set_timesteps(sigmas=DEFAULTS[name], mu=mu)
    wanted.set_timesteps(6)
    assert torch.equal(scheduler.sigmas, wanted.sigmas) and scheduler.num_inference_steps == 6
    scheduler.set_timesteps(
        timesteps=DEFAULTS[name] * 1000 if name != "a list" else [1000 * s for s in DEFAULTS[name]]
    )
    assert torch.equal(scheduler.sigmas, wanted.sigmas)


def test_levels_that_someone_chose_are_shifted_as_the_stock_scheduler_shifts_them():
    chosen = [1.0, 0.8, 0.3]
    scheduler = ours()
    scheduler.set_timesteps(sigmas=chosen)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.set_timesteps(sigmas=chosen)
    torch.testing.assert_close(scheduler.sigmas, stock.sigmas, rtol=0, atol=1e-7)
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 20.0])
    assert scheduler.timesteps.tolist() == pytest.approx([900, 500, 20]) and scheduler.sigmas[-1] == 0
    scheduler.set_timesteps(timesteps=[900.0, 500.0], sigmas=[0.75, 0.25])
    assert scheduler.timesteps.tolist() == pytest.approx([900, 500])


def test_windows_that_end_before_the_clean_end():
    scheduler = ours(window_boundaries=[1.0, 0.5, 0.25], num_time_windows=None)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.25]
    with pytest.raises(ValueError, match=r"above 0\.25"):
        scheduler.set_timesteps(sigmas=[0.9, 0.01])


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_mu_moves_the_windows_only_if_asked(kind):
    mu = 0.9
    dynamic = {"use_dynamic_shifting": True, "time_shift_type": kind, "window_shift": 2.0}
    still, moving = ours(**dynamic), ours(**dynamic, reshift=True)
    for scheduler in (still, moving):
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=mu)
    trained = ours(shift=2.0)
    trained.set_timesteps(4)
    assert torch.equal(still.sigmas, trained.sigmas)
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    stock.set_timesteps(sigmas=np.linspace(1, 0.25, 4), mu=mu)
    torch.testing.assert_close(moving.sigmas, stock.sigmas, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "No number of steps"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"num_inference_steps": "4"}, "without quotes"),
        ({"num_inference_steps": 3, "sigmas": [0.9, 0.5]}, "Different numbers of steps"),
        ({"sigmas": [0.5, 0.9]}, "strictly falling"),
        ({"sigmas": ["a"]}, "sigmas="),
        ({"timesteps": []}, "timesteps="),
    ],
)
def test_a_run_that_cannot_be_leaves_the_former_one(call, words):
    scheduler = ours()
    scheduler.set_timesteps(4)
    before = scheduler.timesteps
    with pytest.raises(ValueError, match=words):
        scheduler.set_timesteps(**call)
    assert scheduler.timesteps is before and scheduler.num_inference_steps == 4


def test_fewer_steps_than_windows_are_warned_of_once():
    scheduler = ours()
    with pytest.warns(UserWarning, match="windows are merged"):
        scheduler.set_timesteps(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3))


def test_half_precision_is_rounded_once():
    scheduler = ours()
    scheduler.set_timesteps(4)
    z, out = random(2, 4, 8, 8, dtype=torch.bfloat16), random(2, 4, 8, 8, seed=1, dtype=torch.bfloat16)
    got = scheduler.step(out, scheduler.timesteps[0], z, return_dict=False)[0]
    dt = float(scheduler.sigmas[1] - scheduler.sigmas[0])
    exact = z.double() + dt * out.double()
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact.float().to(torch.bfloat16))
    mixed = scheduler.step(out, scheduler.timesteps[1], z.float(), return_dict=False)[0]
    assert mixed.dtype == torch.bfloat16  # as diffusers' scheduler returns it


def test_one_timestep_a_sample_is_each_sample_by_itself():
    scheduler = ours()
    scheduler.set_timesteps(4)
    z, out = random(3, 4, 8, 8), random(3, 4, 8, 8, seed=1)
    places = [2, 0, 3]
    together = scheduler.step(out, scheduler.timesteps[places], z)
    for i, place in enumerate(places):
        sigma, then = scheduler.sigmas[place], scheduler.sigmas[place + 1]
        torch.testing.assert_close(together.prev_sample[i], z[i] + (then - sigma) * out[i], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.pred_original_sample[i], z[i] - sigma * out[i], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="expected steps of this run"):
        scheduler.step(out, torch.tensor([1000.0, 3.0, 2.0]), z)


def test_the_estimate_of_the_clean_sample_is_it_where_the_network_is_right():
    scheduler = ours()
    scheduler.set_timesteps(5)
    x0, noise = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    for t in scheduler.timesteps:
        z = scheduler.scale_noise(x0, t[None], noise)
        got = scheduler.step(noise - x0, t, z)
        torch.testing.assert_close(got.pred_original_sample, x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("begin", [None, 2])
def test_noising_is_stock_euler_s_to_the_last_bit(begin):
    scheduler = ours()
    scheduler.set_timesteps(6)
    stock = stock_on(scheduler)
    x0, noise = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    if begin is not None:
        scheduler.set_begin_index(begin)
        stock.set_begin_index(begin)
    t = scheduler.timesteps[2].repeat(2)
    assert torch.equal(scheduler.scale_noise(x0, t, noise), stock.scale_noise(x0, t, noise))
    assert torch.equal(scheduler.add_noise(x0, noise, t), scheduler.scale_noise(x0, t, noise))
    halves = x0.bfloat16(), noise.bfloat16()
    assert torch.equal(scheduler.scale_noise(halves[0], t, halves[1]), stock.scale_noise(halves[0], t, halves[1]))


def test_a_run_that_starts_in_the_middle():
    scheduler = ours()
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3 and scheduler.step_index is None
    stock = stock_on(scheduler)
    stock.set_begin_index(3)
    z = random(2, 4, 8, 8)
    for i, t in enumerate(scheduler.timesteps[3:].clone()):  # copies, as pipelines may pass
        out = random(2, 4, 8, 8, seed=i)
        mine, theirs = (one.step(out, t, z, return_dict=False)[0] for one in (scheduler, stock))
        assert torch.equal(mine, theirs) and scheduler.step_index == 4 + i
        z = mine
    with pytest.raises(ValueError, match="All 6 steps are done"):
        scheduler.step(out, t, z)
    with pytest.raises(ValueError, match="begin_index=6"):
        scheduler.set_begin_index(6)


def test_each_token_may_have_a_time_of_its_own():
    scheduler = ours()
    scheduler.set_timesteps(4)
    stock = stock_on(scheduler)
    z, out = random(2, 5, 3), random(2, 5, 3, seed=1)
    tokens = torch.tensor([[1000.0, 900.0, 500.0, 10.0, 0.0]]).expand(2, -1)
    for t in scheduler.timesteps:
        mine, theirs = (
            one.step(out, t, z, per_token_timesteps=tokens, return_dict=False)[0] for one in (scheduler, stock)
        )
        assert torch.equal(mine, theirs)


def test_inverted_levels_are_stock_euler_s():
    scheduler = ours(invert_sigmas=True)
    scheduler.set_timesteps(5)
    stock = FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
    levels = ours()
    levels.set_timesteps(5)
    stock.set_timesteps(sigmas=levels.sigmas[:-1].tolist())
    assert torch.equal(scheduler.timesteps, stock.timesteps) and torch.equal(scheduler.sigmas, stock.sigmas)
    outputs, z = [random(2, 4, 8, 8, seed=i) for i in range(5)], random(2, 4, 8, 8, seed=9)
    assert torch.equal(run(scheduler, z, outputs)[-1], run(stock, z, outputs)[-1])
    x0, noise = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    scheduler.set_timesteps(timesteps=[100.0, 500.0, 980.0])
    assert scheduler.timesteps.tolist() == pytest.approx([100, 500, 980]) and scheduler.sigmas[-1] == 1
    scheduler.set_timesteps(5)
    noised = scheduler.scale_noise(x0, scheduler.timesteps[2:3], noise)
    estimate = scheduler.step(x0 - noise, scheduler.timesteps[2], noised).pred_original_sample
    torch.testing.assert_close(estimate, x0, rtol=0, atol=1e-5)


def test_places_are_no_timesteps():
    scheduler = ours()
    z = random(1, 4, 8, 8)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(z, torch.tensor(1000.0), z)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="integer tensor"):
        scheduler.step(z, torch.tensor(0), z)
    with pytest.raises(ValueError, match="timestep=1"):
        scheduler.step(z, 1, z)
    with pytest.raises(ValueError, match="noise=None"):
        scheduler.scale_noise(z, scheduler.timesteps[:1])


def test_nothing_on_the_way_asks_a_device(monkeypatch):
    """No number leaves a tensor during steps and noising."""
    scheduler = ours()
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    z, out = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)

    def asked(*_):
        raise AssertionError("a number was asked for")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, asked)
    for t in scheduler.timesteps:
        scheduler.scale_noise(z, t.expand(2), out)
        scheduler.step(out, t, z, return_dict=False)


def test_it_compiles_into_one_graph():
    scheduler = ours()
    scheduler.set_timesteps(4)
    step = torch.compile(
        lambda t, out, z: scheduler.step(out, t, z, return_dict=False)[0], backend="eager", fullgraph=True
    )
    z, out = random(2, 4, 8, 8), random(2, 4, 8, 8, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        dt = scheduler.sigmas[i + 1] - scheduler.sigmas[i]
        torch.testing.assert_close(step(t, out, z), z + dt * out, rtol=0, atol=1e-6)


def test_pipelines_take_it_for_what_it_stands_for():
    scheduler = ours()
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and scheduler.order == 1
    assert scheduler.init_noise_sigma == 1.0 and len(scheduler) == 1000
    assert scheduler.sigmas.shape == (1000,) and torch.equal(scheduler.timesteps, scheduler.sigmas * 1000)
    assert scheduler.config.base_image_seq_len == 256 and scheduler.shift == 3.0


def test_the_product_is_rounded_by_itself():
    """One product, one sum: a fused one differs in the last bit for some of 4096 numbers."""
    z, out = random(4096), random(4096, seed=1)
    dt = float(np.float32(-math.pi / 10))
    wanted = (z.numpy() + np.float32(dt) * out.numpy()).astype(np.float32)
    assert np.array_equal(combine.euler_step(z, out, dt).numpy(), wanted)
