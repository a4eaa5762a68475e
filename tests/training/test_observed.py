"""Teachers that are learnt by watching: what is found out, against plain runs of diffusers; refusals in words."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, StableDiffusionXLPipeline
from flow_teachers import ARGUMENTS, save_teacher

from perflow_diffusers import load_miniature
from perflow_diffusers.flow import SigmaWindows
from perflow_training.config import ConfigError, TrainingConfig
from perflow_training.teacher.load import load_pipeline
from perflow_training.teacher.observed import watch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from flow_builders import FLOW

PROMPTS = ["a person with red hair", "a dog"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """name -> the loaded pipeline of tests/training/flow_teachers.py."""
    made = {}

    def get(name):
        if name not in made:
            folder = save_teacher(name, tmp_path_factory.mktemp(name))
            made[name] = load_pipeline(TrainingConfig(pretrained_model_name_or_path=str(folder)))
        return made[name]

    return get


# what each network's own code says: argument of the latents, time as slope and offset over sigma, sign, rows
FACTS = {
    "sd3": ("hidden_states", (1000, 0), 1, {"encoder_hidden_states", "pooled_projections"}),
    "flux": ("hidden_states", (1, 0), 1, {"encoder_hidden_states", "pooled_projections", "guidance"}),
    "qwen": ("hidden_states", (1, 0), 1, {"encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"}),
    "z": ("x", (-1, 1), -1, {"cap_feats"}),
    "wan": ("hidden_states", (1000, 0), 1, {"encoder_hidden_states"}),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_pipeline_says_how_its_network_is_called(teachers, name):
    observed = watch(teachers(name), yaml.safe_load(ARGUMENTS[name]), scale=3.0)
    latent, line, sign, rows = FACTS[name]
    call = observed.call
    assert (call.latent, (call.slope, call.offset), call.sign) == (latent, line, sign)
    assert set(observed.rows) == rows
    assert observed.residual < 1e-6
    assert observed.guided.classifier_free == (name != "flux")


def velocities(pipe, observed, prompts, noise, steps, given):
    """(states, noise levels, velocities) of a plain run under diffusers' Euler: changes of states over levels."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    own, pipe.scheduler, states = pipe.scheduler, scheduler, [noise]

    def note(_, step, timestep, tensors):
        states.append(tensors["latents"].clone())
        return tensors

    arguments = {**observed.runs.arguments, **given, "output_type": "latent", "callback_on_step_end": note}
    with torch.no_grad():
        pipe(prompts, latents=noise, num_inference_steps=steps, **arguments)
    pipe.scheduler = own
    levels = scheduler.sigmas.double()
    return (
        states,
        levels,
        [(b - a) / (t - s) for a, b, s, t in zip(states, states[1:], levels, levels[1:], strict=False)],
    )


@pytest.mark.parametrize("name", FACTS)
def test_the_backbone_is_the_velocity_of_the_pipeline_s_own_run(teachers, name):
    """In other states and at other times than were watched, and with another time for each sample."""
    pipe = teachers(name)
    observed = watch(pipe, yaml.safe_load(ARGUMENTS[name]))
    noise = torch.randn(2, *observed.shape, generator=torch.Generator().manual_seed(5))
    scale = 2.5 if name == "flux" else None  # which is told its guidance
    given = dict(observed.guided.off) if scale is None else {"guidance_scale": scale}
    states, levels, wanted = velocities(pipe, observed, PROMPTS, noise, 5, given)
    cond, backbone = observed.conditions(PROMPTS, scale), observed.backbone()
    with torch.no_grad():
        for z, sigma, velocity in zip(states, levels, wanted, strict=False):
            got = backbone(z, sigma.expand(2), cond)
            torch.testing.assert_close(got, velocity.float(), rtol=1e-3, atol=1e-4)
        mixed = torch.stack([states[1][0], states[3][1]])
        got = backbone(mixed, levels[[1, 3]], cond)
        torch.testing.assert_close(got, torch.stack([wanted[1][0], wanted[3][1]]).float(), rtol=1e-3, atol=1e-4)


def test_trajectories_are_those_of_the_pipeline_on_the_windows_grid():
    """Guided, as diffusers' own Euler scheduler draws them on the same noise levels, bit for bit."""
    pipe = load_miniature("flow")
    observed = watch(pipe, scale=5.0)
    windows = SigmaWindows.uniform(3, observed.shift)
    noise = torch.randn(2, *observed.shape, generator=torch.Generator().manual_seed(3))
    states = observed.follow(PROMPTS, noise, windows, 2, 5.0)
    grid = windows.grid(6)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    seen = []

    def note(_, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return tensors

    pipe(PROMPTS, latents=noise, sigmas=grid[:-1], guidance_scale=5.0, output_type="latent", callback_on_step_end=note)
    assert observed.shift == 2.0
    assert len(states) == 4 and torch.equal(states[0], noise)
    for state, wanted in zip(states[1:], seen[1::2], strict=True):
        assert torch.equal(state, wanted)


def test_a_unet_is_watched_as_its_code_says(tiny_sdxl):
    observed = watch(load_miniature(), scale=3.0)
    call = observed.call
    assert (call.latent, call.time, call.whole, observed.rows) == (
        "sample",
        "timestep",
        True,
        ("encoder_hidden_states",),
    )
    assert observed.residual == 0 and not observed.flow
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    inside = {"added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"}
    assert set(watch(pipe).rows) == {"encoder_hidden_states", *inside}


def stateful(pipe):
    """The network's output also depends on how often it was called."""
    forward, calls = pipe.transformer.forward, []

    def changed(*args, **kwargs):
        calls.append(1)
        return (forward(*args, **kwargs)[0] * (1 + 0.01 * len(calls)),)

    pipe.transformer.forward = changed


def random_output(pipe):
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *a, **k: (torch.nn.functional.dropout(forward(*a, **k)[0], 0.5),)


def told_more(pipe):
    """A second input that follows from the state, as a ControlNet's."""
    inner = pipe.transformer.forward

    def forward(
        hidden_states=None, encoder_hidden_states=None, pooled_projections=None, timestep=None, extra=None, **k
    ):
        return inner(hidden_states, encoder_hidden_states, pooled_projections, timestep, **k)

    pipe.transformer.forward = forward
    kind = type(pipe.transformer)

    class Told(kind):
        def __call__(self, *args, hidden_states, **kwargs):
            mean = hidden_states.mean((1, 2, 3), keepdim=True)[0]
            return kind.__call__(self, *args, hidden_states=hidden_states, extra=mean, **kwargs)

    pipe.transformer.__class__ = Told


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (stateful, "does not reproduce its network's output|answers differently|is not the velocity"),
        (random_output, "answers differently when it is asked the same again|is not the velocity"),
        (told_more, "tells its network anew in every step: `extra`|`timestep`, `extra`|`extra`, `timestep`"),
        (lambda pipe: setattr(pipe, "transformer_2", pipe.transformer), "several networks .*One network alone"),
        (lambda pipe: setattr(pipe, "transformer", None), "has no `unet` or `transformer`"),
    ],
)
def test_what_cannot_be_learnt_is_refused_in_words(spoil, words):
    pipe = load_miniature("flow")
    spoil(pipe)
    with pytest.raises(ConfigError, match=words):
        watch(pipe)


def test_an_output_that_is_no_velocity_is_refused(monkeypatch):
    pipe = load_miniature("flow")
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *a, **k: (forward(*a, **k)[0] * 3,)
    step = FlowMatchEulerDiscreteScheduler.step
    monkeypatch.setattr(
        FlowMatchEulerDiscreteScheduler, "step", lambda self, out, t, sample, **k: step(self, out / 3, t, sample, **k)
    )
    with pytest.raises(ConfigError, match="is not the velocity of its latents, nor minus it"):
        watch(pipe)


def built(row):
    """(pipeline, arguments of every call, arguments of captions) of a row of tests/pipelines/flow_builders.py."""
    one = FLOW[row](FlowMatchEulerDiscreteScheduler(shift=3.0))
    texts = {name: value for name, value in one.arguments.items() if "embeds" in name}
    given = {name: value for name, value in one.arguments.items() if name not in texts and "scale" not in name}
    return one.pipe, given, lambda captions: {n: v.expand(len(captions), *v.shape[1:]) for n, v in texts.items()}


@pytest.mark.parametrize("row", ["sd3-img2img", "sd3-inpaint"])
def test_pipelines_that_start_on_a_picture_are_refused(row):
    with pytest.raises(ConfigError, match="takes 3 of 4 steps: it starts on a picture"):
        watch(*built(row))


def test_a_controlnet_s_inputs_are_refused():
    """Its residuals follow from the state, and are not zero in a trained one."""
    pipe, given, prompts = built("sd3-controlnet")
    torch.manual_seed(0)
    for weight in pipe.controlnet.parameters():
        weight.data.add_(0.1 * torch.randn_like(weight))
    words = "anew in every step: .*block_controlnet_hidden_states.* Train on the text-to-image"
    with pytest.raises(ConfigError, match=words):
        watch(pipe, given, prompts)


def test_arguments_that_the_call_does_not_take_are_named():
    with pytest.raises(ConfigError, match=r"call has no `num_frames`\. Known: .*prompt"):
        watch(load_miniature("flow"), {"num_frames": 5})


class Unguided(StableDiffusion3Pipeline):
    """Takes a scale and does nothing with it."""

    do_classifier_free_guidance = False


def test_a_scale_that_changes_nothing_is_refused():
    pipe = Unguided(**load_miniature("flow").components)
    assert not watch(pipe).guided.classifier_free
    with pytest.raises(ConfigError, match=r"`solve_guidance=3` changes nothing in Unguided"):
        watch(pipe, scale=3.0)
