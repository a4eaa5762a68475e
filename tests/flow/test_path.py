"""NoisePath against diffusers' own tables and the definitions of what networks predict."""

import pytest
import torch
from diffusers import DDIMScheduler

from perflow_diffusers.flow import BASE_PREDICTIONS, NoisePath

RAMP = torch.linspace(1e-4, 0.03, 50).tolist()
SCHEDULES = [
    {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": RAMP, "num_train_timesteps": 50},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77},
]


def noisy(path, batch=5, dtype=torch.float64):
    """Data, noise, timesteps (batch,) spread over 1..N and the states there."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(batch, 4, 3, 3, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    t = torch.linspace(1, path.num_train_timesteps, batch).long()
    return x0, eps, t, path.add_noise(x0, eps, t)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("to_one", [False, True])
def test_tables_are_those_of_ddim(schedule, rescale, to_one):
    options = {**schedule, "rescale_betas_zero_snr": rescale, "set_alpha_to_one": to_one}
    path, ddim = NoisePath.from_betas(**options), DDIMScheduler(**options)
    assert torch.equal((path.alpha[1:] ** 2).float(), ddim.alphas_cumprod)
    assert (path.alpha[0] ** 2).float() == ddim.final_alpha_cumprod
    assert torch.allclose(path.alpha**2 + path.sigma**2, torch.ones_like(path.alpha), atol=1e-15, rtol=0)
    assert path.num_train_timesteps == len(ddim.alphas_cumprod)
    assert path.zero_terminal_snr == rescale


def test_defaults_are_stable_diffusion_1_5():
    path = NoisePath.from_betas()
    # The well-known end of that schedule: abar = 0.0047, sigma / alpha = 14.6.
    assert path.alpha[-1] ** 2 == pytest.approx(0.00466, abs=1e-5)
    assert path.sigma[-1] / path.alpha[-1] == pytest.approx(14.61, abs=0.01)
    assert path.sigma[0] == path.sigma[1] == pytest.approx(0.0292, abs=1e-4)


def test_straight_path():
    path = NoisePath.straight(1000)
    assert path.alpha[250] == 0.75 and path.sigma[250] == 0.25
    assert path.sigma[0] == 0 and path.alpha[0] == 1
    assert path.zero_terminal_snr
    x0, eps, t, z = noisy(path)
    sigma = (t / 1000).reshape(-1, 1, 1, 1).double()
    assert torch.allclose(z, (1 - sigma) * x0 + sigma * eps, atol=1e-7)


@pytest.mark.parametrize("name", BASE_PREDICTIONS)
@pytest.mark.parametrize("path", [NoisePath.from_betas(), NoisePath.straight(1000)], ids=["sd", "straight"])
def test_to_x0_eps_inverts_the_definition(name, path):
    x0, eps, t, z = noisy(path)
    if path.zero_terminal_snr and name == "epsilon":
        return
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in path.at(t))
    out = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[name]
    x0_back, eps_back = path.to_x0_eps(out, z, t, name)
    assert torch.allclose(x0_back, x0, atol=1e-12)
    assert torch.allclose(eps_back, eps, atol=1e-12)


def test_add_noise_and_velocity_agree_with_diffusers():
    ddim = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    path = NoisePath.from_betas()
    x0, eps, t, z = noisy(path, dtype=torch.float32)
    assert torch.allclose(z, ddim.add_noise(x0, eps, t - 1), atol=2e-6)
    assert torch.allclose(path.to_x0_eps(ddim.get_velocity(x0, eps, t - 1), z, t, "v_prediction")[0], x0, atol=1e-5)


def test_a_batch_equals_its_samples_one_by_one():
    path = NoisePath.from_betas()
    x0, eps, t, z = noisy(path, dtype=torch.float32)
    for i, one in enumerate(t.tolist()):
        assert torch.equal(path.add_noise(x0[i : i + 1], eps[i : i + 1], one), z[i : i + 1])
    assert z.dtype == torch.float32


def test_to_moves_the_tables_and_nothing_else():
    path = NoisePath.from_betas()
    moved = path.to("meta")
    assert moved.alpha.device.type == "meta" and moved.alpha.dtype == torch.float64
    assert path.alpha.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"beta_schedule": "cosine"}, "`beta_schedule='cosine'`"),
        ({"trained_betas": [0.1, 0.2]}, r"`trained_betas` has shape \(2,\)"),
        ({"beta_schedule": "linear", "beta_end": 1.5}, "betas run from"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, "betas run from"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps=0`"),
    ],
)
def test_bad_schedules_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        NoisePath.from_betas(**arguments)


def test_bad_tables_and_predictions_are_refused():
    path = NoisePath.from_betas()
    z = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="two tables of one length"):
        NoisePath(path.alpha, path.sigma[1:])
    with pytest.raises(ValueError, match="expected float64"):
        NoisePath(path.alpha.float(), path.sigma.float())
    with pytest.raises(ValueError, match="no noise schedule"):
        NoisePath.from_alphas_cumprod(torch.tensor([0.5, 1.5]))
    with pytest.raises(ValueError, match="`num_train_timesteps=0`"):
        NoisePath.straight(0)
    with pytest.raises(ValueError, match="`prediction='noise'`; expected one of epsilon"):
        path.to_x0_eps(z, z, 5, "noise")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        NoisePath.straight(10).to_x0_eps(z, z, 5, "epsilon")
