"""Which of diffusers' schedulers have a base with discrete betas, and that all others are refused."""

import ast
import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    schedulers,
)
from diffusers.utils import DummyObject

from perflow_diffusers.schedulers.scheduling_perflow import PeRFlowScheduler

# Decided by reading each one's source: are its `alphas_cumprod` the product of 1 - beta, as the arguments give it?
BETAS = {
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "RePaintScheduler", "SASolverScheduler",
    "TCDScheduler", "UnCLIPScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
OTHERS = {
    "AmusedScheduler", "BlockRefinementScheduler", "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler", "ConsistencyDecoderScheduler", "CosineDPMSolverMultistepScheduler",
    "DDPMWuerstchenScheduler", "DiscreteDDIMScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EntropyBoundScheduler", "FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler",
    "IPNDMScheduler", "KarrasVeScheduler", "LTXEulerAncestralRFScheduler", "MiniMaxH3Scheduler", "PiflowScheduler",
    "RFD4ProteinaScheduler", "SCMScheduler", "ScoreSdeVeScheduler", "ScoreSdeVpScheduler", "VQDiffusionScheduler",
}  # fmt: skip
# diffusers makes numpy arrays of torch tensors in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

REQUIRED = {"mask_token_id": 0, "num_vec_classes": 8}
SCHEDULES = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "few": {"beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.3, "num_train_timesteps": 50},
    "trained": {"trained_betas": [0.001 + 1e-4 * i for i in range(100)], "num_train_timesteps": 100},
    "zero snr": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    "class default": {},
}


def arguments_of(name):
    kind = getattr(schedulers, name)
    return {} if isinstance(kind, DummyObject) else inspect.signature(kind.__init__).parameters


def build(name, **options):
    """The scheduler with the options that it has; arguments without a default are filled in."""
    known = arguments_of(name)
    empty = {k: REQUIRED.get(k, "linear") for k, p in known.items() if p.default is p.empty and k in REQUIRED}
    return getattr(schedulers, name)(**empty, **{k: v for k, v in options.items() if k in known})


def missing_packages(name):
    return isinstance(getattr(schedulers, name), DummyObject)


def forms_of(name, live):
    """Its config in every form in which a config is met."""
    live_config = type(live.config)(live.config)  # writing it as JSON adds its class
    file = json.loads(live.to_json_string())
    loaded = type(live).from_config(file).config
    return {"live": live_config, "plain": dict(live_config), "file": file, "loaded": loaded}


def test_every_scheduler_of_diffusers_is_decided():
    """A new one in diffusers fails here: read how it makes its alphas, and add it to one of the two sets."""
    folder = Path(schedulers.__file__).parent
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("scheduling_*.py")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    names = {node.name for node in classes if "SchedulerMixin" in map(ast.unparse, node.bases)}
    exported = {name for name in dir(schedulers) if name.endswith("Scheduler")}
    assert names | exported == BETAS | OTHERS
    assert not BETAS & OTHERS


def schedules_of(name):
    """Those that a scheduler takes; UnCLIP has one only, and RePaint cannot read its own saved `trained_betas`."""
    known = arguments_of(name).keys() - ({"trained_betas"} if name == "RePaintScheduler" else set())
    fitting = [label for label, options in SCHEDULES.items() if options.keys() <= known]
    return fitting if "beta_start" in known else ["squaredcos_cap_v2", "class default"]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [(name, schedule) for name in sorted(BETAS) if not missing_packages(name) for schedule in schedules_of(name)],
)
def test_the_noise_levels_are_those_of_the_scheduler_itself(name, schedule):
    options = SCHEDULES[schedule]
    live = build(name, **options)
    for form, config in {**forms_of(name, live), "least": {"_class_name": name, **options}}.items():
        ours = PeRFlowScheduler.from_config(config, perflow_type="velocity")
        assert torch.equal(ours.alphas_cumprod[:-1], live.alphas_cumprod[:-1]), form
        last = live.alphas_cumprod[-1]
        # 0 at zero terminal SNR, where some put the smallest number that they can divide by.
        assert ours.alphas_cumprod[-1] == (0 if last == 2**-24 else last), form
        assert ours.config.prediction_type == live.config.get("prediction_type")
        assert len(ours) == live.config.num_train_timesteps


@pytest.mark.parametrize("name", [name for name in sorted(BETAS | OTHERS) if missing_packages(name)])
def test_a_class_whose_packages_are_missing_has_to_say_its_betas(name):
    with pytest.raises(ValueError, match=f"config of {name}.*Pass `beta_start`"):
        PeRFlowScheduler.from_config({"_class_name": name}, prediction_type="ddim_eps")
    told = {"_class_name": name, **SCHEDULES["scaled_linear"]}
    if name in BETAS:
        ours = PeRFlowScheduler.from_config(told, prediction_type="ddim_eps")
        assert torch.equal(ours.alphas_cumprod, DDIMScheduler(**SCHEDULES["scaled_linear"]).alphas_cumprod)
    else:
        with pytest.raises(ValueError, match="EDM"):
            PeRFlowScheduler.from_config({**told, "sigma_data": 1.0}, prediction_type="ddim_eps")


@pytest.mark.parametrize("name", [name for name in sorted(OTHERS) if not missing_packages(name)])
def test_other_processes_are_refused_in_every_form(name):
    forms = {"least": {"_class_name": name}}
    if name != "RFD4ProteinaScheduler":
        forms.update(forms_of(name, build(name)))
    for config in forms.values():
        # Without its class, IPNDM's two arguments beside someone's betas say nothing.
        betas = {} if name == "IPNDMScheduler" and "_class_name" not in config else SCHEDULES["scaled_linear"]
        for more in ({}, betas):
            with pytest.raises(ValueError, match=r"scheduler config belongs to.*discrete betas.*load_config"):
                PeRFlowScheduler.from_config({**config, **more}, prediction_type="ddim_eps")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: FlowMatchEulerDiscreteScheduler(shift=3.0).config, r"belongs to flow matching \(`shift` in it\)"),
        (lambda: {"_class_name": "FlowMatchEulerDiscreteScheduler"}, r"\(`FlowMatchEulerDiscreteScheduler`\)"),
        (lambda: UniPCMultistepScheduler(use_flow_sigmas=True).config, "`use_flow_sigmas` in it"),
        (lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction").config, "='flow_prediction'"),
        (lambda: {**SCHEDULES["linear"], "prediction_type": "flow"}, "flow matching"),
        (lambda: EulerDiscreteScheduler(timestep_type="continuous").config, "`timestep_type='continuous'`"),
        (lambda: {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 1.0}, "CogVideoX"),
        (lambda: {"_class_name": "TheirFlowScheduler", "shift": 1.0}, "flow matching"),
        (lambda: {"_class_name": "TheirScheduler"}, "config of TheirScheduler.*Pass `beta_start`"),
        (lambda: {"_class_name": "TheirScheduler", "beta_schedule": "linear"}, "config of TheirScheduler"),
        (lambda: {"_class_name": ["a", "b"]}, r"config of \['a', 'b'\]"),
        (lambda: {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"}, "`beta_schedule='sigmoid'`; expected"),
        (lambda: {"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "`beta_schedule='laplace'`; expected"),
        (lambda: {"_class_name": "HeunDiscreteScheduler", "beta_schedule": "exp"}, "`beta_schedule='exp'`; expected"),
    ],
)
def test_what_is_refused_is_named(config, words):
    with pytest.raises(ValueError, match=words):
        PeRFlowScheduler.from_config(config(), prediction_type="ddim_eps")


def test_a_folder_is_read_by_the_same_rules(tmp_path):
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow")
    DDIMScheduler(beta_end=0.015).save_pretrained(tmp_path / "ddim")
    for read in (PeRFlowScheduler.from_pretrained, PeRFlowScheduler.from_config):
        with pytest.raises(ValueError, match="flow matching"):
            read(str(tmp_path / "flow"), prediction_type="ddim_eps")
        assert read(str(tmp_path / "ddim"), prediction_type="ddim_eps").config.beta_end == 0.015


def test_facts_of_the_caller_stand_for_those_of_an_unknown_class():
    config = {"_class_name": "TheirScheduler", "num_train_timesteps": 100}
    made = PeRFlowScheduler.from_config(config, prediction_type="ddim_eps", **SCHEDULES["linear"])
    assert torch.equal(made.alphas_cumprod, DDIMScheduler(num_train_timesteps=100).alphas_cumprod)
    betas = PeRFlowScheduler.from_config(config, prediction_type="ddim_eps", trained_betas=[0.01] * 100)
    assert torch.equal(betas.alphas_cumprod, torch.cumprod(1 - torch.full((100,), 0.01), 0))


def test_a_plain_dict_without_a_class_means_the_defaults_of_ours():
    for config in ({}, {"prediction_type": "v_prediction"}, {"num_train_timesteps": 1000, "clip_sample": False}):
        made = PeRFlowScheduler.from_config(config, perflow_type="velocity")
        assert torch.equal(made.alphas_cumprod, PeRFlowScheduler(prediction_type="velocity").alphas_cumprod)


def test_defaults_of_a_class_stay_defaults_on_the_way_back():
    """An Euler config from a DDIM file that leaves its betas out is Euler's with its own, as without us."""
    for name in ("DDIMScheduler", "HeunDiscreteScheduler", "LCMScheduler"):
        file = {"_class_name": name, "beta_end": 0.014}
        perflow = PeRFlowScheduler.from_config(file, prediction_type="ddim_eps")
        for target in (getattr(schedulers, name), EulerDiscreteScheduler):
            back, expected = target.from_config(perflow.config), target.from_config(file)
            assert torch.equal(back.alphas_cumprod, expected.alphas_cumprod)
            assert {k: back.config[k] for k in expected.config if k[0] != "_"} == {
                k: v for k, v in expected.config.items() if k[0] != "_"
            }
