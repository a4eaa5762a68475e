"""Configs of flow-matching schedulers: from diffusers' and back without loss, and what is refused."""

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from perflow_diffusers import FlowMatchPeRFlowScheduler, PeRFlowScheduler

DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def ours(**options):
    return FlowMatchPeRFlowScheduler(**{"shift": 3.0, "num_time_windows": 4, **options})


CONFIGS = {
    "static": {"shift": 3.0},
    "dynamic": {**DYNAMIC, "base_image_seq_len": 128, "max_image_seq_len": 2048, "time_shift_type": "linear"},
    "terminal": {**DYNAMIC, "shift_terminal": 0.1},
    "karras": {"shift": 2.0, "use_karras_sigmas": True, "num_train_timesteps": 500},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_stock_config_comes_back_without_loss(name, tmp_path):
    stock = FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    windows = {} if "use_dynamic_shifting" not in CONFIGS[name] else {"window_shift": 2.5}
    scheduler = FlowMatchPeRFlowScheduler.from_config(stock.config, num_time_windows=4, **windows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    facts = {key: value for key, value in stock.config.items() if key[0] != "_"}
    assert facts == {key: back.config[key] for key in facts}
    scheduler.save_pretrained(tmp_path)
    read = FlowMatchPeRFlowScheduler.from_pretrained(tmp_path)
    assert read.windows == scheduler.windows and type(read) is FlowMatchPeRFlowScheduler
    again = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    options = {"mu": 0.6} if "use_dynamic_shifting" in CONFIGS[name] else {}
    for one in (stock, again):
        one.set_timesteps(7, **options)
    assert torch.equal(stock.sigmas, again.sigmas)
    if name != "karras":
        other = FlowMatchPeRFlowScheduler.from_config(scheduler.config, window_boundaries=[1.0, 0.5, 0.0])
        assert other.windows.boundaries == (1.0, 0.5, 0.0)


def test_samplers_in_flow_mode_say_their_shift():
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler = FlowMatchPeRFlowScheduler.from_config(unipc.config, num_time_windows=2)
    assert scheduler.windows.boundaries == (1.0, 5 * 0.5 / (1 + 4 * 0.5), 0.0)
    heun = FlowMatchPeRFlowScheduler.from_config(FlowMatchHeunDiscreteScheduler(shift=2.0).config)
    assert heun.windows.boundaries == pytest.approx([2 * u / (1 + u) for u in (1, 0.75, 0.5, 0.25, 0)])


def test_a_scheduler_or_a_pipeline_is_no_config(tiny_pipeline):
    stock = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"is no configuration.*`scheduler\.config`"):
        FlowMatchPeRFlowScheduler.from_config(stock)
    with pytest.raises(ValueError, match=r"is no configuration.*`pipe\.scheduler\.config`"):
        FlowMatchPeRFlowScheduler.from_config(tiny_pipeline)


def test_bases_of_another_process_are_refused_both_ways():
    with pytest.raises(ValueError, match=r"PeRFlowScheduler\.from_config"):
        FlowMatchPeRFlowScheduler.from_config(DDIMScheduler().config)
    with pytest.raises(ValueError, match="EDM"):
        FlowMatchPeRFlowScheduler.from_config(EDMEulerScheduler().config)
    for config in (FlowMatchEulerDiscreteScheduler().config, ours().config):
        with pytest.raises(ValueError, match="FlowMatchPeRFlowScheduler"):
            PeRFlowScheduler.from_config(config, prediction_type="velocity")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dynamic_shifting": True}, "window_shift"),
        ({"num_time_windows": 0}, "num_windows=0"),
        ({"window_boundaries": [1000, 500, 0], "num_time_windows": None}, "window_boundaries"),
        ({"window_boundaries": "1, 0", "num_time_windows": None}, "expected a list"),
        ({"window_boundaries": [1.0, 0.0]}, "num_time_windows=4"),
        ({"window_shift": -1.0}, "shift=-1.0"),
        ({"stochastic_sampling": True}, "stochastic_sampling=False"),
        ({"time_shift_type": "cubic"}, "time_shift_type='cubic'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
    ],
)
def test_what_cannot_be_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        ours(**options)
