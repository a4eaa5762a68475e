"""Calls as people get them wrong: one sentence that says what was passed and what to do, before anything changes."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import perflow_diffusers as pf
from perflow_diffusers import hub, weights
from perflow_diffusers.miniature import miniature_folder
from refusals import bits, refused

LORA = miniature_folder() / "lora" / "pytorch_lora_weights.safetensors"


@pytest.fixture
def pipe():
    pipe = pf.load_miniature()
    pipe.set_progress_bar_config(disable=True)
    return pipe


TAKERS = {  # every function whose first argument is a pipeline
    "load_perflow": lambda thing: pf.load_perflow(thing, "miniature"),
    "unload_perflow": lambda thing: pf.unload_perflow(thing),
    "set_perflow_scale": lambda thing: pf.set_perflow_scale(thing, 1.0),
    "set_scheduler": lambda thing: pf.set_scheduler(thing, "miniature"),
    "merge_delta": lambda thing: pf.merge_delta(thing, "miniature"),
    "unmerge_delta": lambda thing: pf.unmerge_delta(thing),
    "set_delta_scale": lambda thing: pf.set_delta_scale(thing, 1.0),
    "plan_merge": lambda thing: weights.plan_merge(thing, "miniature"),
    "measure_moments": lambda thing: pf.measure_moments(thing, lambda: None),
    "export_pipeline": lambda thing: pf.export_pipeline(thing, "folder"),
    "is_base": lambda thing: pf.PeRFlowArtifact("ddim_eps", base_hash=f"sha256:{'0' * 64}").is_base(thing),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ("miniature", ("'miniature' (text)", "The pipeline", "comes first")),
        (Path("model"), ("(a path)", "comes first")),
        (0.5, ("0.5 (a number)", "comes first")),
        ({}, ("a dict has no UNet", "comes first")),
        (None, ("None has no UNet", "from_pretrained")),
        (StableDiffusionPipeline, ("The class StableDiffusionPipeline", "StableDiffusionPipeline.from_pretrained")),
        (UNet2DConditionModel, ("The class UNet2DConditionModel", "from_pretrained")),
        (pf.load_miniature, ("the function load_miniature",)),
        (SimpleNamespace(prior=torch.nn.Linear(2, 2)), ("it has a `prior`", "SDXL")),
        (SimpleNamespace(unet=None, scheduler=None), ("its `unet` is None", "Pass a UNet")),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(getattr(value, "__name__", value))[:20],
)
def test_what_is_no_pipeline(name, thing, words):
    refused(lambda: TAKERS[name](thing), *words)


@pytest.mark.parametrize("name", ["load_perflow", "unload_perflow", "set_scheduler", "export_pipeline"])
def test_a_unet_where_the_whole_pipeline_belongs(name, pipe):
    refused(
        lambda: TAKERS[name](pipe.unet), "UNet2DConditionModel is a part of a pipeline", "whole pipeline", pipe=pipe
    )
    pf.load_perflow(pipe, "miniature")
    refused(lambda: TAKERS[name](pipe.unet), "part of a pipeline", pipe=pipe)
    assert not hasattr(pipe.unet, "scheduler")


def test_the_pipeline_after_the_source(pipe):
    for call in (pf.load_perflow, pf.merge_delta, pf.set_scheduler, weights.plan_merge):
        refused(lambda call=call: call("miniature", pipe), "comes first", pipe=pipe)
    for call in (pf.set_perflow_scale, pf.set_delta_scale):
        refused(lambda call=call: call(0.5, pipe), "comes first", pipe=pipe)
    refused(lambda: pf.export_pipeline("folder", pipe), "comes first", pipe=pipe)
    refused(lambda: pf.measure_moments(lambda: None, pipe), "comes first", pipe=pipe)


def test_a_model_where_an_accelerator_belongs(pipe):
    other = pf.load_miniature("disco")
    for source in (other, other.unet):
        refused(lambda source=source: pf.load_perflow(pipe, source), "is a model", "`compute_delta(base", pipe=pipe)
        refused(
            lambda source=source: pf.merge_delta(pipe, source), "complete weights", "`compute_delta(base", pipe=pipe
        )
        refused(lambda source=source: hub.describe(source), "is a model", "`describe_weights`")


def test_what_no_weights_can_be_read_from(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for thing, word in (
        (None, "None"),
        (3, "3 (a number)"),
        (torch.zeros(3), "a Tensor"),
        (["miniature"], "a list"),
        (UNet2DConditionModel, "the class UNet2DConditionModel"),
        (pf.load_miniature, "the function load_miniature"),
    ):
        for call in (pf.open_weights, weights.describe_weights, weights.content_hash, weights.as_delta):
            refused(
                lambda call=call, thing=thing: call(thing), f"Cannot read weights from {word}", "Pass a state dict"
            )
        refused(lambda thing=thing: pf.load_perflow(pipe, thing), word, pipe=pipe)
        refused(lambda thing=thing: pf.merge_delta(pipe, thing), word, pipe=pipe)
    artifact = pf.PeRFlowArtifact.from_pretrained("miniature")
    refused(lambda: pf.merge_delta(pipe, artifact), "artifact.files['delta']", "`load_perflow`", pipe=pipe)
    pf.merge_delta(pipe, artifact.files["delta"]).undo()
    (tmp_path / "some.safetensors").touch()
    for call in (pf.open_weights, weights.describe_weights, hub.describe):
        refused(lambda call=call: call(""), "is empty")
    refused(lambda: pf.open_weights("minature"), "Did you mean 'miniature'?")


def paths(pipe, out):
    """Every function that writes, with `out` where its path belongs."""
    pf.load_perflow(pipe, "miniature")
    disco = pf.load_miniature("disco")
    artifact = pf.PeRFlowArtifact.from_pretrained("miniature")
    return {
        "compute_delta(base, tuned": lambda: pf.compute_delta(pipe, disco, out),
        "extract_lora(delta": lambda: pf.extract_lora("miniature", out, rank=1),
        "shrink_delta(delta": lambda: pf.shrink_delta("miniature", out, "int8"),
        "convert_lora(lora": lambda: pf.convert_lora("miniature-lora", out, "kohya"),
        "combine([first": lambda: pf.combine(["miniature-lora"], out),
        "merge_files(base": lambda: weights.merge_files(disco, "miniature", out),
        "delta_for_comfy(delta": lambda: weights.delta_for_comfy("miniature", out),
        "export_pipeline(pipe": lambda: pf.export_pipeline(pipe, out),
        "artifact.save(": lambda: artifact.save(out),
        "PeRFlowArtifact.from_folder(": lambda: pf.PeRFlowArtifact.from_folder(out),
        "with_files(": lambda: artifact.with_files(lora=out),
        "push_perflow(folder": lambda: pf.push_perflow(out, "owner/name"),
    }


@pytest.mark.parametrize("out", [64, torch.float16, ["a.safetensors"], pf.load_miniature, ""])
def test_what_is_no_path_where_one_belongs(out, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for order, call in paths(pipe, out).items():
        refused(call, "where a path belongs", order)
    assert not list(tmp_path.iterdir())


def test_models_in_the_place_of_paths(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    disco = pf.load_miniature("disco")
    for arguments in (("delta.safetensors", pipe, disco), (pipe, "delta.safetensors", disco)):
        refused(lambda given=arguments: pf.compute_delta(*given), "out is a StableDiffusionPipeline", "base, tuned")
    refused(lambda: pf.combine(["miniature"], [1.0], "out.safetensors"), "out is a list", "combine([first, second]")
    refused(lambda: pf.push_perflow("folder", None), "repo_id is None", "owner/name")
    assert not list(tmp_path.iterdir())


TEXT = {
    "scale of load_perflow": (lambda pipe: pf.load_perflow(pipe, "miniature", scale="0.5"), "scale='0.5'"),
    "scale of merge_delta": (lambda pipe: pf.merge_delta(pipe, "miniature", "0.5"), "scale='0.5'"),
    "scale of a block": (lambda pipe: pf.load_perflow(pipe, "miniature", scale={"down": "0.5"}), "down='0.5'"),
    "scale of plan_merge": (lambda pipe: weights.plan_merge(pipe, "miniature", scale="1"), "scale='1'"),
    "scale of files": (lambda pipe: weights.merge_files(pipe, "miniature", "a.safetensors", scale="1"), "scale='1'"),
    "a bool": (lambda pipe: pf.merge_delta(pipe, "miniature", True), "scale=True"),
    "scales": (lambda pipe: pf.combine(["miniature"], "a.safetensors", ["1"]), "scale='1'"),
    "scales in one": (lambda pipe: pf.combine(["miniature"], "a.safetensors", "1"), "scales is '1' (text)"),
    "scales as one number": (lambda pipe: pf.combine(["miniature"], "a.safetensors", 1), "scales is 1 (a number)"),
    "the place of weights": (lambda pipe: pf.load_perflow(pipe, "miniature", 0.5), "by name: scale=0.5"),
    "rank": (lambda pipe: pf.extract_lora("miniature", "a", rank="64"), "rank='64'"),
    "energy": (lambda pipe: pf.extract_lora("miniature", "a", energy="0.9"), "energy='0.9'"),
    "alpha": (lambda pipe: pf.extract_lora("miniature", "a", alpha="8"), "alpha='8'"),
    "oversampling": (lambda pipe: pf.extract_lora("miniature", "a", oversampling="3"), "oversampling='3'"),
    "power_iterations": (lambda pipe: pf.extract_lora("miniature", "a", power_iterations=1.5), "power_iterations=1.5"),
    "seed": (lambda pipe: pf.extract_lora("miniature", "a", seed="0"), "seed='0'"),
    "moments": (lambda pipe: pf.extract_lora("miniature", "a", moments=lambda: 1), "`measure_moments(pipe, lambda"),
    "a moment": (lambda pipe: pf.extract_lora("miniature", "a", moments={"conv_in.weight": 3}), "measure_moments"),
    "run": (lambda pipe: pf.measure_moments(pipe, "a prompt"), "'a prompt' (text)"),
    "metadata": (lambda pipe: pf.compute_delta(pipe, pipe, metadata="x"), "metadata is 'x'"),
    "shards": (lambda pipe: pf.compute_delta(pipe, pipe, "a", max_shard_size="5GB"), "max_shard_size='5GB'"),
    "guidance": (lambda pipe: pf.PeRFlowArtifact("ddim_eps", guidance_scale="7.5"), "guidance_scale='7.5'"),
    "solve guidance": (lambda pipe: pf.PeRFlowArtifact("ddim_eps", solve_guidance="7"), "solve_guidance='7'"),
    "windows": (lambda pipe: pf.PeRFlowArtifact("ddim_eps", num_time_windows="4"), "num_time_windows='4'"),
    "steps": (lambda pipe: pf.PeRFlowArtifact("ddim_eps", recommended_steps=4), "recommended_steps=4"),
    "type": (lambda pipe: pf.PeRFlowArtifact("epsilon"), "one of ddim_eps"),
    "form": (lambda pipe: pf.PeRFlowArtifact("ddim_eps").with_files(loar="a"), "Pass delta, lora, kohya"),
    "windows of the scheduler": (lambda pipe: scheduler(num_time_windows="4"), "`num_time_windows='4'`"),
    "timesteps": (lambda pipe: scheduler(num_train_timesteps="1000"), "`num_train_timesteps='1000'`"),
    "t_noise": (lambda pipe: scheduler(t_noise="1"), "`t_noise='1'`"),
    "betas": (lambda pipe: scheduler(beta_start="0.1"), "`beta_start='0.1'`"),
    "boundaries": (lambda pipe: scheduler(window_boundaries="1000,0"), "expected a list"),
    "prompts": (lambda pipe: pf.miniature_prompts("3"), "`n='3'`"),
    "dtype of the miniature": (lambda pipe: pf.load_miniature(dtype="float16"), "torch.float16"),
    "a scheduler for its config": (
        lambda pipe: pf.PeRFlowScheduler.from_config(pipe.scheduler, prediction_type="ddim_eps"),
        "`scheduler.config`",
    ),
    "a pipeline for its config": (
        lambda pipe: pf.PeRFlowArtifact("ddim_eps").make_scheduler(pipe),
        "`pipe.scheduler.",
    ),
}


def scheduler(**settings):
    return pf.PeRFlowScheduler(prediction_type="ddim_eps", **settings)


@pytest.mark.parametrize("case", TEXT)
def test_text_and_other_things_where_numbers_belong(case, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, word = TEXT[case]
    refused(lambda: call(pipe), word, pipe=pipe)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["4", 4.0, True])
def test_steps_that_are_no_integer(steps, pipe):
    pf.load_perflow(pipe, "miniature")
    refused(
        lambda: pipe("a person", num_inference_steps=steps, guidance_scale=1.0), f"`num_inference_steps={steps!r}`"
    )


def test_numbers_of_other_libraries_and_dtypes_by_name_are_taken(pipe, tmp_path):
    for scale in (np.float32(0.5), torch.tensor(0.5), np.array(0.5), 1):
        with pf.merge_delta(pipe, "miniature", scale) as handle:
            assert handle.scale == float(scale)
    for dtype in (torch.float16, "float16"):
        path = tmp_path / f"{dtype}.safetensors"
        assert set(pf.compute_delta(pipe, pf.load_miniature("disco"), path, dtype).dtypes.values()) == {torch.float16}
        assert pf.shrink_delta("miniature", tmp_path / f"small-{dtype}.safetensors", dtype).dtype == "float16"


@pytest.mark.parametrize("scale", [100, -5, {"mid": 100}])
def test_a_scale_far_from_any_use_is_warned_of_once_and_before_anything_changes(scale, pipe, tmp_path):
    calls = (
        lambda: pf.merge_delta(pipe, "miniature", scale),
        lambda: pf.load_perflow(pipe, "miniature", scale=scale),
        lambda: pf.load_perflow(pipe, "miniature-lora", scale=scale),
        lambda: weights.merge_files(pipe, "miniature", tmp_path / "a.safetensors", scale=scale),
    )
    before = bits(pipe)
    for call in calls:
        with pytest.raises(UserWarning, match="1 is the whole delta"):  # warnings are errors here
            call()
        assert all(torch.equal(weight, before[name]) for name, weight in pipe.unet.state_dict().items())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pf.load_perflow(pipe, "miniature", scale=scale)
        pf.set_perflow_scale(pipe, scale)
    assert len(said) == 2 and {one.filename for one in said} == {__file__}
    pf.unload_perflow(pipe)


@pytest.mark.parametrize("scale", [0, 0.5, 1.5, 3, -1, {"down": 1.2, "mid": -0.5}])
def test_a_scale_that_people_use_is_not(scale, pipe):
    pf.merge_delta(pipe, "miniature", scale).undo()


def test_a_pipeline_without_a_scheduler_says_so(pipe):
    pipe.scheduler = None
    refused(lambda: pf.load_perflow(pipe, "miniature"), "has no scheduler", "whole pipeline")
