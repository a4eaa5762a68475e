"""What PeRFlowScheduler refuses, and that the message says what was given and what to do."""

import pytest
import torch

from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prediction_type": None}, "was not given.*ddim_eps, diff_eps, velocity"),
        ({"prediction_type": "epsilon"}, "what the base model predicts.*perflow info FILE"),
        ({"prediction_type": "flow"}, "`prediction_type='flow'`; expected PeRFlow's ddim_eps"),
        ({"prediction_type": "epsilon", "perflow_type": "v_prediction"}, "what the base model predicts"),
        ({"perflow_type": "diff_eps"}, "contradict"),
        ({"num_time_windows": 0}, "`num_time_windows=0`; expected an integer from 1 to 1000"),
        ({"num_time_windows": 1001}, "`num_time_windows=1001`"),
        ({"t_noise": 1.1}, "`t_noise=1.1` and `t_clean=0.0`"),
        ({"t_noise": 0.5, "t_clean": 0.6}, "1 >= t_noise > t_clean >= 0"),
        ({"window_boundaries": [1000, 500, 600, 0]}, "strictly falling"),
        ({"window_boundaries": [1.0, 0.5, 0.0]}, "expected integer timesteps"),
        ({"window_boundaries": [900, 500, 0]}, "run from 1000 to 0"),
        (
            {"window_boundaries": [1000, 500, 0], "num_time_windows": 3},
            "`num_time_windows=3` and `window_boundaries` of 2",
        ),
        ({"beta_schedule": "cosine"}, "`beta_schedule='cosine'`"),
        ({"trained_betas": [0.1]}, "`trained_betas` has shape"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps=0`"),
        ({"num_train_timesteps": 1000.0}, "`num_train_timesteps=1000.0`; expected an integer"),
        ({"num_time_windows": 4.0}, "`num_time_windows=4.0`; expected an integer"),
        ({"num_time_windows": "4"}, "`num_time_windows='4'`; expected an integer"),
        ({"t_noise": 0.5, "t_clean": 0.4999}, "`t_noise=0.5` and `t_clean=0.4999`; .*a timestep .1 of 1000. between"),
        ({"t_noise": float("nan")}, "`t_noise=nan`"),
        ({"window_boundaries": 500}, "`window_boundaries=500`"),
        ({"window_boundaries": [1000, None, 0]}, r"`window_boundaries=\[1000, None, 0\]`"),
        ({"window_boundaries": [1000, float("nan"), 0]}, r"`window_boundaries=\[1000, nan, 0\]`"),
        ({"beta_start": -0.001}, "`beta_start=-0.001` and `beta_end=0.012`"),
        ({"prediction_type": "epsilon", "perflow_type": "eps"}, "`perflow_type='eps'`; expected ddim_eps, diff_eps"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        PeRFlowScheduler(**{"prediction_type": "ddim_eps", **options})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "pass exactly one"),
        ({"num_inference_steps": 4, "timesteps": [1000]}, "pass exactly one"),
        ({"num_inference_steps": 0}, "`num_inference_steps=0`; expected an integer >= 1"),
        ({"num_inference_steps": -3}, "`num_inference_steps=-3`"),
        ({"num_inference_steps": 4.5}, "`num_inference_steps=4.5`"),
        ({"num_inference_steps": 1001}, "250 timesteps"),
        ({"timesteps": []}, "strictly falling integers, at most 1000 and more than 0"),
        ({"timesteps": [500, 750]}, "strictly falling"),
        ({"timesteps": [500, 500]}, "strictly falling"),
        ({"timesteps": [1001, 500]}, "at most 1000"),
        ({"timesteps": [500, 0]}, "more than 0"),
        ({"timesteps": [500.5, 20]}, "strictly falling integers"),
        ({"timesteps": 1000}, "`timesteps=1000`; expected strictly falling integers"),
        ({"timesteps": torch.tensor([[1000, 500]])}, "strictly falling integers"),
        ({"timesteps": [1000, None]}, "strictly falling integers"),
        ({"timesteps": ["a"]}, "strictly falling integers"),
        ({"timesteps": [float("nan")]}, "strictly falling integers"),
    ],
)
def test_bad_runs_are_refused_and_change_nothing(arguments, words):
    scheduler = PeRFlowScheduler(prediction_type="ddim_eps")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=words):
        scheduler.set_timesteps(**arguments)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250] and scheduler.num_inference_steps == 4


def test_bad_steps_are_refused():
    scheduler = PeRFlowScheduler(prediction_type="ddim_eps")
    z = torch.zeros(2, 4, 8, 8)
    for t in (1000, torch.tensor(1000), torch.tensor([1000, 750])):
        with pytest.raises(ValueError, match="Call `set_timesteps`"):
            scheduler.step(z, t, z)
    scheduler.set_timesteps(4)
    for t in (999, torch.tensor(999), torch.tensor([1000, 999])):
        with pytest.raises(ValueError, match=r"999.*xpected (one|steps) of"):
            scheduler.step(z, t, z)
    for t in ([-1, 1000], [1001, 1000], [1000.4, 1000.4], [float("nan"), 1000.0]):
        with pytest.raises(ValueError, match=r"expected steps of this run"):
            scheduler.step(z, torch.tensor(t), z)
    for t in scheduler.timesteps:
        scheduler.step(z, t, z)
    with pytest.raises(ValueError, match="All 4 steps are done"):
        scheduler.step(z, scheduler.timesteps[0], z)
    for index in (4, -1):
        with pytest.raises(ValueError, match=rf"`begin_index={index}`.*strength"):
            scheduler.set_begin_index(index)


@pytest.mark.parametrize("timesteps", [625.5, torch.tensor([625.0, 0.5]), torch.tensor([float("nan")])])
def test_noise_is_not_added_at_a_rounded_timestep(timesteps):
    z = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match="expected integers"):
        PeRFlowScheduler(prediction_type="ddim_eps").add_noise(z, z, timesteps)
