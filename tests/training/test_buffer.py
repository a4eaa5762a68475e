"""The window buffer: how seldom it solves, how much it keeps, and that processes share its draws."""

import pytest
import torch

from perflow_training.buffer import SolvedWindows, WindowBuffer
from perflow_training.conditions import Conditions
from perflow_training.draws import Draws


def solves(trajectories, first=0, windows=4, size=1):
    """solve(number): z is 1000 * number + trajectory, the window's number is `start`."""

    def solve(number):
        row = torch.arange(first, first + trajectories).repeat(windows)
        z = (1000.0 * number + row).reshape(-1, 1, 1, 1).expand(-1, 1, size, size).clone()
        start = torch.arange(windows).repeat_interleave(trajectories)
        return SolvedWindows(z, z + 0.5, start, start + 1, Conditions(z[:, 0]))

    return solve


def numbers(batch):
    return [(int(z), int(s)) for z, s in zip(batch.z_start[:, 0, 0, 0], batch.start, strict=True)]


@pytest.mark.parametrize("reuse", [1, 4])
def test_solves_as_seldom_as_reuse_says_and_stays_bounded(reuse):
    buffer = WindowBuffer(solves(8), size=64, reuse=reuse, draws=Draws(0), trajectories=8)
    drawn = [buffer.batch(16, step) for step in range(64)]
    assert buffer.solved == 64 * 16 // reuse
    assert len(buffer) == min(64, buffer.solved)
    newest = buffer.solved // 32 - 1
    assert {z // 1000 for z, _ in numbers(drawn[-1])} <= {newest, newest - 1}


def test_a_solve_larger_than_the_buffer_is_kept_whole():
    buffer = WindowBuffer(solves(8), size=4, reuse=1, draws=Draws(0), trajectories=8)
    buffer.batch(16, 0)
    assert len(buffer) == 32


def test_draws_are_even_over_all_windows():
    buffer = WindowBuffer(solves(6), size=10**6, reuse=10**6, draws=Draws(0), trajectories=6)
    counts = torch.zeros(6, 4)
    for step in range(2000):
        for z, window in numbers(buffer.batch(4, step)):
            counts[z, window] += 1
    assert abs(float(counts.sum()) - 8000) == 0
    assert (counts / 8000 * 24 - 1).abs().max() < 0.2  # 333 +- 18 draws each


def test_two_processes_draw_what_one_draws():
    one = WindowBuffer(solves(8), size=64, reuse=2, draws=Draws(5), trajectories=8)
    two = [
        WindowBuffer(solves(4, first=4 * rank), size=32, reuse=2, draws=Draws(5, rank, 2), trajectories=4)
        for rank in range(2)
    ]
    for step in range(40):
        whole = numbers(one.batch(12, step))
        assert whole == [row for buffer in two for row in numbers(buffer.batch(6, step))]


def test_a_batch_has_one_picture_size_in_proportion():
    sizes = {0: 1, 1: 2, 2: 2}
    buffer = WindowBuffer(
        lambda number: solves(2, size=sizes[number])(number), size=100, reuse=10**6, draws=Draws(0), trajectories=2
    )
    for number in range(3):
        buffer.add(buffer.solve(number))
    large = 0
    for step in range(600):
        batch = buffer.batch(2, step)
        large += batch.z_start.shape[-1] == 2
        assert {int(z) // 1000 for z in batch.z_start[:, 0, 0, 0]} <= ({1, 2} if batch.z_start.shape[-1] == 2 else {0})
    assert abs(large / 600 - 2 / 3) < 0.06


def test_state_restores_the_draws_to_come():
    first = WindowBuffer(solves(4), size=48, reuse=2, draws=Draws(1), trajectories=4)
    for step in range(7):
        first.batch(8, step)
    tensors, counts = first.state()
    assert tensors["0.cond.embeds"].shape[0] == 4  # not once a window
    second = WindowBuffer(solves(4), size=48, reuse=2, draws=Draws(1), trajectories=4)
    second.load_state(tensors, counts, "cpu")
    for step in range(7, 20):
        a, b = first.batch(8, step), second.batch(8, step)
        assert numbers(a) == numbers(b)
        assert torch.equal(a.cond.embeds, b.cond.embeds)
        assert torch.equal(a.z_end, b.z_end)
