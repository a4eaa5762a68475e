"""base_of() against diffusers' schedulers, and rows of prediction types against what its DDIM does with them."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from perflow_diffusers.cli.weights import PerflowType
from perflow_diffusers.flow import BASE_TYPES, PREDICTION_TYPES, NoisePath, base_of, coefficients, noise_facts


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction", BASE_TYPES)
@pytest.mark.parametrize("rescale", [False, True])
def test_a_base_is_what_its_scheduler_says(kind, prediction, rescale):
    own = kind(
        num_train_timesteps=50, beta_schedule="linear", prediction_type=prediction, rescale_betas_zero_snr=rescale
    )
    base = base_of({key: value for key, value in own.config.items() if key != "set_alpha_to_one"})
    assert base.prediction == prediction
    # Euler keeps 2**-24 for a last 0.
    assert torch.allclose(base.path.alpha[1:] ** 2, own.alphas_cumprod.double(), rtol=0, atol=2**-24)
    # diffusers tells the network 0 for its first noise level, which is the path's timestep 1.
    assert 1 + base.index_offset == 0


def test_what_a_config_leaves_out_is_that_of_the_reader():
    base = base_of({})
    assert base.prediction is None
    assert torch.equal(base.path.alpha, NoisePath.from_betas().alpha)
    ends = base_of({"set_alpha_to_one": True}).path
    assert ends.alpha[0] == 1 and torch.equal(ends.alpha[1:], base.path.alpha[1:])
    with pytest.raises(ValueError, match="beta_start"):
        base_of({"beta_start": None})


def test_facts_are_those_that_are_said():
    config = {"beta_start": 0.1, "beta_end": None, "clip_sample": True, "trained_betas": [0.1], "steps_offset": 1}
    assert noise_facts(config) == {"beta_start": 0.1, "trained_betas": [0.1]}


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_a_row_says_what_other_samplers_make_of_its_network(name):
    row = PREDICTION_TYPES[name]
    assert base_of({"prediction_type": name}).prediction == row.base_prediction
    assert row.base_prediction in (None, *BASE_TYPES)
    path = NoisePath.from_betas()
    generator = torch.Generator().manual_seed(0)
    z, out = (torch.randn(1, 4, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    ddim = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type=row.base_prediction or "epsilon",
    )
    ddim.set_timesteps(4)  # steps of 250, from a noise level to one 250 below
    theirs = ddim.step(out, 750, z).prev_sample
    lam, eta = coefficients(path, name, 751, 501)
    assert torch.allclose(lam * z + eta * out, theirs, rtol=0, atol=1e-5) == row.is_ddim


@pytest.mark.parametrize("name", PREDICTION_TYPES)
def test_a_row_says_whether_it_is_defined_without_any_data(name):
    path = NoisePath.from_betas(rescale_betas_zero_snr=True)
    lam, eta = PREDICTION_TYPES[name].coefficients(path, 1000, 750)
    assert bool(lam.isfinite() & eta.isfinite()) == PREDICTION_TYPES[name].zero_snr


def test_the_command_line_knows_the_same_types():
    assert get_args(PerflowType) == tuple(PREDICTION_TYPES)
