"""The window buffer: how seldom it solves, how much it keeps, and that processes share its draws."""

import math

import pytest
import torch
from live_tensors import live_bytes

from perflow_training.buffer import SolvedWindows, WindowBuffer
from perflow_training.rng import Draws
from perflow_training.teacher.conditions import Conditions


def solves(trajectories, first=0, windows=4, size=1):
    """solve(number): z is 1000 * number + trajectory, the window's number is `start`."""

    def solve(number):
        row = torch.arange(first, first + trajectories).repeat(windows)
        z = (1000.0 * number + row).reshape(-1, 1, 1, 1).expand(-1, 1, size, size).clone()
        start = torch.arange(windows).repeat_interleave(trajectories)
        return SolvedWindows(z, z + 0.5, start, start + 1, Conditions({"embeds": z[:, 0]}))

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
    assert tensors["0.cond.0"].shape[0] == 4  # not once a window
    second = WindowBuffer(solves(4), size=48, reuse=2, draws=Draws(1), trajectories=4)
    second.load_state(tensors, counts, "cpu")
    for step in range(7, 20):
        a, b = first.batch(8, step), second.batch(8, step)
        assert numbers(a) == numbers(b)
        assert torch.equal(a.cond.rows["embeds"], b.cond.rows["embeds"])
        assert torch.equal(a.z_end, b.z_end)


def solved_by(number, trajectories=4, windows=3):
    """A solve as a teacher gives it: latents and conditions that no other solve has."""
    random = torch.Generator().manual_seed(number)
    z_start, z_end = torch.randn(2, trajectories * windows, 2, 8, 8, generator=random)
    start = torch.arange(windows, 0, -1).repeat_interleave(trajectories)
    shapes = {"embeds": (7, 5), "pooled": (3,), "sizes": (6,)}
    cond = Conditions({name: torch.randn(trajectories, *of, generator=random) for name, of in shapes.items()})
    return SolvedWindows(z_start, z_end, start, start - 1, cond)


def test_a_batch_is_the_rows_of_all_windows_laid_end_to_end():
    """The drawing spelt out: every window with a copy of its conditions, all solves joined, one row a sample."""
    draws, count, trajectories = Draws(3), 6, 4
    buffer = WindowBuffer(solved_by, size=36, reuse=2, draws=draws, trajectories=trajectories)
    lanes = math.gcd(count, trajectories)
    for step in range(12):
        batch = buffer.batch(count, step)
        last = buffer.number - 1
        solves = [solved_by(number) for number in range(max(0, last - 2), last + 1)]
        z_start, z_end, start, end = (
            torch.cat([getattr(solve, name) for solve in solves]) for name in ("z_start", "z_end", "start", "end")
        )
        lane_of = [row % trajectories * lanes // trajectories for row in range(len(start))]
        rows = [[row for row, lane in enumerate(lane_of) if lane == mine] for mine in range(lanes)]
        uniform = draws.uniform("window", step, count)
        drawn = [rows[i * lanes // count] for i in range(count)]
        drawn = [mine[int(u * len(mine))] for mine, u in zip(drawn, uniform, strict=True)]
        assert torch.equal(batch.z_start, z_start[drawn]) and torch.equal(batch.z_end, z_end[drawn])
        assert torch.equal(batch.start, start[drawn]) and torch.equal(batch.end, end[drawn])
        for name, part in batch.cond.tensors().items():
            whole = torch.cat([solve.cond.tensors()[name].repeat(3, *[1] * (part.ndim - 1)) for solve in solves])
            assert torch.equal(part, whole[drawn]), name


def test_every_window_is_held_once_and_its_conditions_once_a_trajectory():
    before = live_bytes()
    buffer = WindowBuffer(solved_by, size=36, reuse=2, draws=Draws(3), trajectories=4)
    for step in range(12):
        buffer.batch(6, step)
    latents, conditions = 36 * 2 * 2 * 64 * 4, 12 * (7 * 5 + 3 + 6) * 4
    numbers = 36 * 8 * 8  # path indices (twice: of a solve and of its shelf) and places
    assert latents + conditions <= live_bytes() - before <= latents + conditions + numbers


def test_pictures_and_trajectories_share_a_shelf():
    """Solves of one window a sample among solves of three; the conditions of each row are its own."""

    def solve(number):
        whole = solved_by(number)
        rows = torch.arange(4, 8)
        return whole[rows] if number % 2 else whole

    buffer = WindowBuffer(solve, size=40, reuse=1, draws=Draws(4), trajectories=4)
    for step in range(10):
        batch = buffer.batch(8, step)
        for z, embeds in zip(batch.z_start, batch.cond.rows["embeds"], strict=True):
            origin = [(n, i) for n in range(buffer.number) for i, other in enumerate(solved_by(n).z_start)
                      if torch.equal(other, z)]  # fmt: skip
            ((number, row),) = origin
            assert torch.equal(embeds, solved_by(number).cond.rows["embeds"][row % 4])
