"""Flow-matching pipelines of diffusers, called: the network sees the windows' grid, the steps are diffusers' own."""

import dataclasses
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from flow_builders import FLOW
from test_pipeline_table import rows

from perflow_diffusers import FlowMatchPeRFlowScheduler

DYNAMIC = (
    "flux-text-to-image",
    "flux-img2img",
    "qwen-image",
    "ltx-text-to-video",
)  # their bases shift time with the resolution
# Of diffusers itself, when some transformers are built and some pipelines imported.
pytestmark = pytest.mark.filterwarnings("ignore:`(FluxPosEmbed|LoraLoaderMixin)` is deprecated:FutureWarning")
STEPS = 6
PAGE = (Path(__file__).parents[2] / "docs" / "flow_pipelines.md").read_text()
FLOW_WORDS = re.compile(r"FlowM\w+Scheduler|use_flow_sigmas|flow_shift")


class OnGrid(FlowMatchEulerDiscreteScheduler):
    """diffusers' own Euler, told its levels beforehand whatever a pipeline passes."""

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        super().set_timesteps(sigmas=self.levels, device=device)


def base_config(name):
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=name in DYNAMIC).config


def scheduler_for(name):
    shift = {"window_shift": 3.0} if name in DYNAMIC else {}
    return FlowMatchPeRFlowScheduler.from_config(base_config(name), num_time_windows=4, **shift)


def levels(steps):
    scheduler = FlowMatchPeRFlowScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def call(built, **more):
    """The pictures or latents of a call, and the times that the network was told."""
    told = []

    def note(_, args, kwargs):
        named = kwargs.get("timestep", kwargs.get("timesteps"))
        time = args[1] if named is None else named
        told.append(float(time.max()))

    hook = built.pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    options = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3), **more}
    arguments = {**built.arguments, **options}
    arguments["output_type"] = arguments.get("output_type", "pt")
    with torch.no_grad():
        result = built.pipe(**arguments, return_dict=False)[0]
    hook.remove()
    return result, told[:: built.calls_a_step]


@pytest.mark.parametrize("name", FLOW)
def test_the_network_sees_the_windows_and_the_picture_is_diffusers_own(name):
    built = FLOW[name](scheduler_for(name))
    result, told = call(built)
    grid = levels(STEPS)
    skipped = int(STEPS - built.arguments.get("strength", 1.0) * STEPS)  # as diffusers counts them
    assert told == pytest.approx(built.told(grid[:-1]).tolist()[skipped:], rel=1e-6, abs=1e-6)

    stock = OnGrid(shift=1.0)
    stock.levels = grid[:-1].tolist()
    built.pipe.scheduler = stock
    wanted, _ = call(built)
    assert torch.isfinite(result).all() and torch.equal(result, wanted)


@pytest.mark.parametrize("name", ["sd3-text-to-image", "flux-text-to-image", "qwen-image", "z-image", "sana"])
def test_sigmas_of_one_s_own_are_taken_where_the_pipeline_takes_them(name):
    chosen = [1.0, 0.8, 0.3]
    built = FLOW[name](scheduler_for(name))
    _, told = call(built, sigmas=chosen, num_inference_steps=3)
    shifted = torch.tensor([3 * u / (1 + 2 * u) for u in chosen])
    assert told == pytest.approx(built.told(shifted).tolist(), rel=1e-6, abs=1e-6)


def test_a_saved_pipeline_comes_back_with_its_scheduler(tmp_path):
    built = FLOW["sd3-text-to-image"](scheduler_for("sd3-text-to-image"))
    wanted, _ = call(built)
    built.pipe.save_pretrained(tmp_path)
    left_out = {name: None for name, part in built.pipe.components.items() if part is None}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **left_out)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is FlowMatchPeRFlowScheduler
    assert loaded.scheduler.windows == built.pipe.scheduler.windows
    assert torch.equal(call(dataclasses.replace(built, pipe=loaded))[0], wanted)


def flow_classes():
    """The pipelines of the installed diffusers whose module names a flow-matching scheduler or its options."""
    files = (Path(diffusers.__file__).parent / "pipelines").rglob("*.py")
    texts = [text for text in (file.read_text() for file in files) if FLOW_WORDS.search(text)]
    return {
        name for text in texts for name in re.findall(r"^class (\w+)\((?:[^)]*\W)?DiffusionPipeline\b", text, re.M)
    }


def test_every_pipeline_is_a_row_of_the_docs_and_every_row_a_pipeline():
    built = {name: type(build(scheduler_for(name)).pipe).__name__ for name, build in FLOW.items()}
    assert [row[:2] for row in rows("Called", PAGE)] == [[f"`{name}`", f"`{kind}`"] for name, kind in built.items()]


def test_every_flow_matching_pipeline_of_diffusers_is_called_or_has_its_reason_once():
    called = {row[1].strip("`") for row in rows("Called", PAGE)}
    others = [row[0].strip("`") for row in rows("Not called", PAGE)]
    found = flow_classes()
    assert len(found) > 100
    assert sorted(others) == sorted(found - called)
    assert all(row[1] for row in rows("Not called", PAGE))
