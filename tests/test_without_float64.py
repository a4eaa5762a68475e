"""Devices without float64 (MPS, NPUs, DirectML): nothing of it may come to stand on one. "meta" stands for them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perflow_diffusers import PeRFlowScheduler, load_miniature
from perflow_diffusers.flow import PREDICTION_TYPES, NoisePath, euler, interpolate, marginal, solve, target
from perflow_diffusers.flow.solver import METHODS
from perflow_diffusers.weights.make.moments import measure_moments
from perflow_diffusers.weights.merge.layers import MergeStack, check_unchanged, write_weight
from perflow_diffusers.weights.merge.within import values as _values

AWAY = torch.device("meta")


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 on the device, also for a cast on the way home; what comes home are zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, first = function._schema.name, args[0] if args else None
        from_away = isinstance(first, torch.Tensor) and first.device == AWAY
        if name == "aten::_to_copy" and from_away and torch.device(kwargs.get("device") or AWAY) != AWAY:
            result = torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype, device=kwargs["device"])
            if result.dtype == torch.float64 != first.dtype:
                raise TypeError("Cannot convert a tensor to float64: the device has none.")
            return result
        if name == "aten::_local_scalar_dense" and from_away:
            return 0
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device == AWAY and leaf.dtype == torch.float64:
                raise TypeError(f"{function}: the device has no float64.")
        return result


@pytest.fixture(autouse=True)
def without_float64():
    with WithoutFloat64():
        yield


def away(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype, device=AWAY)


def test_the_device_refuses_float64():
    for make in (
        lambda: away(2).double(),
        lambda: away(2).to("cpu", torch.float64),
        lambda: torch.ones(2, dtype=torch.float64).to(AWAY),
        lambda: away(2, dtype=torch.float64),
    ):
        with pytest.raises(TypeError, match="float64"):
            make()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_scheduler(prediction_type, dtype):
    scheduler = PeRFlowScheduler(prediction_type=prediction_type)
    z = away(2, 4, 8, 8, dtype=dtype)
    for options in ({"num_inference_steps": 5}, {"timesteps": [1000, 600, 100]}):
        scheduler.set_timesteps(**options, device=AWAY)
        assert scheduler.timesteps.device == AWAY
        for t in scheduler.timesteps:
            assert scheduler.step(z, t, z).prev_sample.dtype == dtype
        assert scheduler.step(z, scheduler.timesteps[:2], z).pred_original_sample.device == AWAY
        assert scheduler.step(z, 1000, z)[0].device == AWAY
        assert scheduler.add_noise(z, z, scheduler.timesteps[:1]).dtype == dtype
        scheduler.set_begin_index(1)


def test_a_scheduler_made_while_the_device_is_the_default():
    with AWAY:
        scheduler = PeRFlowScheduler(prediction_type="ddim_eps", beta_schedule="squaredcos_cap_v2")
        PeRFlowScheduler(prediction_type="ddim_eps", trained_betas=[0.1] * 8, num_train_timesteps=8)
        NoisePath.straight(10)
        scheduler.set_timesteps(4)
        z = away(1, 4, 8, 8)
        assert scheduler.step(z, scheduler.timesteps[0], z)[0].device == AWAY
    assert scheduler.alphas_cumprod.device == AWAY
    scheduler.set_timesteps(4, device="cpu")
    a, b = euler(NoisePath.from_betas(beta_schedule="squaredcos_cap_v2"), "ddim_eps", 1000, 750, 1000, 750)
    one = torch.ones(1, 4, 8, 8, dtype=torch.float64)
    assert torch.equal(scheduler.step(one, 1000, one)[0], torch.add(one * a.item(), one, alpha=b.item()))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_what_training_computes(prediction_type):
    path, z = NoisePath.from_betas(), away(3, 4, 8, 8)
    for device in ("cpu", AWAY):
        start, end, t = (torch.tensor([x] * 3, device=device) for x in (1000, 750, 800))
        for result in (
            path.add_noise(z, z, start),
            interpolate(z, z, start, end, t),
            target(path, prediction_type, z, z, start, end),
            *path.to_x0_eps(z, z, t),
        ):
            assert result.device == AWAY and result.dtype == torch.float32
        assert marginal(path, start, end, t)[0].device.type == "cpu"
    for method in METHODS:
        assert solve(lambda z, t: z, path, z, 1000, 750, 3, method).device == AWAY


def test_the_chord_in_float32_is_the_one_of_float64_to_the_last_bit():
    """The quotient of two integers, rounded to float32 once or by way of float64."""
    z0, z1 = torch.zeros(1), torch.ones(1)
    for start, end in ((1000, 750), (1000, 0), (997, 331), (100_000, 7)):
        t = torch.arange(end, start + 1)
        wide = ((t - start).double() / (end - start)).float()
        given = interpolate(z0.expand(len(t)), z1.expand(len(t)), torch.tensor(start), torch.tensor(end), t)
        assert torch.equal(given, torch.lerp(z0.expand(len(t)), z1.expand(len(t)), wide))


def test_float64_samples_keep_their_precision_with_a_timestep_each():
    scheduler = PeRFlowScheduler(prediction_type="diff_eps")
    scheduler.set_timesteps(8)
    z = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    given = scheduler.step(z, torch.tensor([1000, 250]), z).prev_sample
    for row, (t, t_next) in zip(given, ((1000, 875), (250, 125)), strict=True):
        a, b = euler(scheduler.path, "diff_eps", *scheduler.windows.of(t), t, t_next)
        assert torch.equal(row, torch.full_like(row, float(a + b)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_merging_and_the_check_of_the_base(dtype):
    weight = away(6, 4, dtype=dtype)
    assert len(_values(weight)) == 24
    stack = MergeStack(marks={"a": torch.zeros(24, dtype=dtype)})
    check_unchanged(stack, {"a": weight})
    for delta in (torch.ones(6, 4, dtype=torch.float64), torch.ones(6, 4, dtype=dtype)):
        for scale in (1.0, 0.5):
            write_weight(weight, None, [(scale, delta, None)])
            write_weight(weight, torch.ones(6, 4, dtype=dtype), [(scale, delta[:, :2], 2)])


@pytest.mark.parametrize("full", [False, True])
def test_moments(full):
    unet = load_miniature().unet.to(AWAY)
    width = unet.config.cross_attention_dim
    moments = measure_moments(unet, lambda: unet(away(1, 4, 8, 8), 500, away(1, 5, width)), full=full)
    assert all(moment.device.type == "cpu" and moment.dtype == torch.float32 for moment in moments.values())
