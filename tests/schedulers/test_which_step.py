"""How a step finds its numbers: by value, by address, by counting, a timestep per sample, inside a compiled graph."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from perflow_diffusers.flow import euler
from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler


def make(prediction_type="ddim_eps", **options):
    return PeRFlowScheduler(prediction_type=prediction_type, **options)


def draw(dtype=torch.float64, batch=2, seed=0):
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    "form",
    [lambda t: t, lambda t: float(t), torch.tensor, lambda t: torch.tensor([t]), lambda t: torch.tensor([t, t])],
)
def test_every_form_of_a_timestep_gives_the_same_step(form):
    scheduler = make()
    scheduler.set_timesteps(5)
    z = expected = draw(torch.float32)
    points = [*scheduler.timesteps.tolist(), 0]
    for t, t_next in pairwise(points):
        a, b = euler(scheduler.path, "ddim_eps", *scheduler.windows.of(t), t, t_next)
        expected = a.float() * expected + b.float() * expected.sin()
        z = scheduler.step(z.sin(), form(t), z, return_dict=False)[0]
    assert torch.allclose(z, expected, rtol=1e-5, atol=1e-6)


def test_a_timestep_per_sample():
    scheduler = make()
    scheduler.set_timesteps(8)
    z, out = draw(torch.float32), draw(torch.float32, seed=1)
    both = scheduler.step(out, torch.tensor([1000, 250]), z)
    for i, t in enumerate((1000, 250)):
        one = scheduler.step(out[i : i + 1], t, z[i : i + 1])
        assert torch.allclose(one.prev_sample, both.prev_sample[i : i + 1], atol=1e-6)
        assert torch.allclose(one.pred_original_sample, both.pred_original_sample[i : i + 1], atol=1e-5)


def test_indices_are_counted():
    scheduler = make()
    assert scheduler.step_index is None and scheduler.begin_index is None
    scheduler.set_timesteps(8)
    z = draw()
    scheduler.step(z, scheduler.timesteps[0], z)
    scheduler.step(z, scheduler.timesteps[1], z)
    assert scheduler.step_index == 2
    scheduler.set_timesteps(8)
    assert scheduler.step_index is None
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3
    scheduler.step(z, scheduler.timesteps[3], z)
    assert scheduler.step_index == 4
    scheduler.set_timesteps(8)
    assert scheduler.begin_index is None
    # Without a begin index the first timestep is found by its value: pipelines that only slice `timesteps`.
    scheduler.step(z, scheduler.timesteps[5], z)
    assert scheduler.step_index == 6


class Operations(TorchDispatchMode):
    """Records the name of every tensor operation."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_step_is_two_operations_and_never_reads_a_tensor():
    scheduler = make()
    scheduler.set_timesteps(4)
    z = draw(torch.float32)
    timesteps = list(scheduler.timesteps)
    scheduler.step(z, timesteps[0], z)
    with Operations() as seen:
        z = scheduler.step(z, timesteps[1], z, return_dict=False)[0]
    assert seen.names == ["aten.mul.Tensor", "aten.add_.Tensor"]
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    with Operations() as seen:
        scheduler.step(z.half(), timesteps[0], z.half(), return_dict=False)
    assert not any("local_scalar" in name for name in seen.names)


@pytest.mark.parametrize("start", [0, 3])
def test_an_element_of_timesteps_is_recognised_without_being_read(start):
    scheduler = make()
    scheduler.set_timesteps(8)
    z = draw(torch.float32)
    numbers = scheduler.step(z, int(scheduler.timesteps[start]), z).prev_sample
    scheduler.set_timesteps(8)
    timestep = next(iter(scheduler.timesteps[start:]))
    with Operations() as seen:
        by_address = scheduler.step(z, timestep, z, return_dict=False)[0]
    assert not any("local_scalar" in name for name in seen.names)
    assert torch.equal(by_address, numbers)
    assert scheduler.step_index == start + 1
    scheduler.set_timesteps(8)
    scheduler.timesteps = scheduler.timesteps[start:].clone()  # others may cut them: these are read
    assert torch.equal(scheduler.step(z, scheduler.timesteps[0], z).prev_sample, numbers)


def test_only_unchanged_elements_of_timesteps_are_taken_by_their_address():
    scheduler = make()
    z = draw(torch.float32)
    forms = [
        lambda t: t.view(torch.int32)[2 * 3],  # little-endian: the lower half of element 3
        lambda t: t[1::2][1],
        lambda t: t.clone()[3],
        lambda t: t.flip(0)[4],
        lambda t: t[3].expand(1),
        lambda t: t[3:4].to(torch.float32),
        lambda t: copy.deepcopy(t)[3],
    ]
    for form in forms:
        scheduler.set_timesteps(8)
        scheduler.step(z, form(scheduler.timesteps), z)
        assert scheduler.step_index == 4
    scheduler.set_timesteps(8)
    scheduler.timesteps -= 1
    with pytest.raises(ValueError, match="`timestep=999` is not a step of this run"):
        scheduler.step(z, scheduler.timesteps[0], z)
    with torch.inference_mode():
        scheduler.set_timesteps(8)
        scheduler.step(z, scheduler.timesteps[3], z)
        assert scheduler.step_index == 4


def test_the_default_device_may_change_between_construction_and_run():
    scheduler, expected = make(), make()
    expected.set_timesteps(5)
    with torch.device("meta"):  # stands for torch.set_default_device("cuda")
        scheduler.set_timesteps(5, device="cpu")
    z = draw()
    for t in expected.timesteps.tolist():
        assert torch.equal(scheduler.step(z, t, z).prev_sample, expected.step(z, t, z).prev_sample)


def test_a_compiled_step_is_one_graph_compiled_once():
    scheduler = make()
    scheduler.set_timesteps(12)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda out, t, z: scheduler.step(out, t, z, return_dict=False)[0], backend=backend, fullgraph=True
    )
    z = draw(torch.float32)
    for t in scheduler.timesteps:
        expected = scheduler.step(z.sin(), t, z, return_dict=False)[0]
        ours = compiled(z.sin(), t, z)
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-6)
        z = ours
    assert len(graphs) == 1
    scheduler.set_timesteps(9)
    for t in scheduler.timesteps:
        assert compiled(z.sin(), t, z).isfinite().all()
    assert len(graphs) == 1
    # Off the grid nothing can raise inside a graph: the result is NaN rather than a plausible picture.
    for t in (999, -1, 1001, 0):
        assert compiled(z.sin(), torch.tensor(t), z).isnan().all()
    torch.compiler.reset()
