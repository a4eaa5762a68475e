"""Random numbers of the global batch, whoever draws them."""

import torch

from perflow_training.rng import Draws


def test_two_processes_draw_what_one_draws():
    one, two = Draws(7), [Draws(7, rank, 2) for rank in range(2)]
    for draw in (
        lambda draws, count: draws.uniform("window", 3, count),
        lambda draws, count: draws.normal("noise", 3, (count, 2, 2)),
    ):
        assert torch.equal(draw(one, 6), torch.cat([draw(draws, 3) for draws in two]))
    assert one.shared("kind", 3) == two[1].shared("kind", 3)


def test_purpose_step_and_seed_each_give_other_numbers():
    drawn = [Draws(seed).uniform(name, step, 4) for seed in (0, 1) for name in ("a", "b") for step in (0, 1)]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 8


def test_distributions():
    numbers = Draws(0).uniform("x", 0, 20000)
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    assert (numbers >= 0).all() and (numbers < 1).all()
    normal = Draws(0).normal("x", 0, (200, 100))
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.03
    assert abs(float((normal[:-1] * normal[1:]).mean())) < 0.03  # neighbours know nothing of each other


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    Draws(0).normal("x", 0, (3, 2))
    assert torch.equal(before, torch.get_rng_state())
