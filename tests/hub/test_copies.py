"""Copies, pickles and twins of an accelerated pipeline act on their own weights, and say what they cannot do."""

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler, StableDiffusionImg2ImgPipeline
from hub_pipes import draw, make_pipe

from perflow_diffusers import PeRFlowScheduler, load_miniature, merge_delta, set_delta_scale, unmerge_delta
from perflow_diffusers.hub import (
    ArtifactError,
    PeRFlowArtifact,
    export_pipeline,
    load_perflow,
    set_perflow_scale,
    set_scheduler,
    unload_perflow,
)
from perflow_diffusers.weights import MergeError, compute_delta, extract_lora, open_weights, plan_merge, shrink_delta

FORMS = pytest.mark.parametrize("weights", ["delta", "lora"])


@pytest.fixture
def pipe(weights, accelerators):
    """An accelerated pipeline, by a delta or by an attached LoRA with a residual."""
    made = make_pipe("sd")
    load_perflow(made, accelerators["sd"].folder, weights)
    return made


@pytest.fixture
def base(bits):
    """The weights and the picture before."""
    plain = make_pipe("sd")
    return bits.copy(plain.unet), draw(plain)


def is_base(pipe, base, bits):
    return bits.same(bits.copy(pipe.unet), base[0]) and type(pipe.scheduler) is DDIMScheduler


@FORMS
def test_a_deep_copy_draws_the_same_and_is_unloaded_by_itself(weights, pipe, base, bits):
    picture, merged = draw(pipe), bits.copy(pipe.unet)
    twin = copy.deepcopy(pipe)
    assert np.array_equal(draw(twin), picture)
    unload_perflow(twin)
    assert is_base(twin, base, bits) and np.array_equal(draw(twin), base[1])
    assert bits.same(bits.copy(pipe.unet), merged) and np.array_equal(draw(pipe), picture)
    unload_perflow(pipe)
    assert is_base(pipe, base, bits)


@FORMS
def test_the_original_is_unloaded_without_its_deep_copy(weights, pipe, base, bits):
    twin = copy.deepcopy(pipe)
    picture = draw(twin)
    set_perflow_scale(twin, 0.5)
    unload_perflow(pipe)
    del pipe
    gc.collect()
    set_perflow_scale(twin, 1.0)
    assert np.abs(draw(twin) - picture).max() < 1e-5
    unload_perflow(twin)
    assert is_base(twin, base, bits)


@FORMS
def test_a_pickled_pipeline_draws_the_same_and_says_what_it_cannot_undo(weights, pipe, bits):
    picture, state = draw(pipe), bits.copy(pipe.unet)
    twin = pickle.loads(pickle.dumps(pipe))
    assert np.array_equal(draw(twin), picture)
    for act in (unload_perflow, lambda it: unload_perflow(it, force=True), lambda it: set_perflow_scale(it, 0.5)):
        with pytest.raises(MergeError, match=r"before it was pickled.*Load the model again"):
            act(twin)
    assert bits.same(bits.copy(twin.unet), state) and np.array_equal(draw(twin), picture)


def test_a_merge_on_a_pickled_unet_is_not_taken_for_the_one_before(accelerators, bits):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder)
    twin = pickle.loads(pickle.dumps(pipe))
    handle = merge_delta(twin, accelerators["sd"].lora, 0.1)
    merged = bits.copy(twin.unet)
    with pytest.raises(MergeError, match="before it was pickled"):
        unload_perflow(twin)
    assert handle.active and bits.same(bits.copy(twin.unet), merged)


def test_a_lora_without_a_residual_is_whole_after_a_pickle(accelerators, base, bits, tmp_path):
    extract_lora(accelerators["sd"].delta, tmp_path / "lora.safetensors", rank=4, residual=False)
    pipe = make_pipe("sd")
    load_perflow(pipe, tmp_path / "lora.safetensors")
    twin = pickle.loads(pickle.dumps(pipe))
    unload_perflow(twin)
    assert is_base(twin, base, bits)


@FORMS
def test_a_shallow_copy_shares_everything_and_either_takes_it_back(weights, pipe, base, bits):
    picture = draw(pipe)
    twin = copy.copy(pipe)
    assert np.array_equal(draw(twin), picture)
    unload_perflow(twin)
    with pytest.warns(UserWarning, match="taken out through another pipeline"):
        draw(pipe)
    unload_perflow(pipe)
    assert is_base(pipe, base, bits) and is_base(twin, base, bits)
    with pytest.raises(ArtifactError, match="Nothing is loaded"):
        unload_perflow(pipe)


@FORMS
@pytest.mark.parametrize("first", ["original", "twin"])
def test_of_pipelines_that_share_a_unet_one_takes_the_weights_and_each_gives_back_its_scheduler(
    weights, first, pipe, base, bits, tmp_path
):
    twin = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(ArtifactError, match=r"is loaded into this pipeline.*share"):
        load_perflow(twin, "miniature")
    one, other = (pipe, twin) if first == "original" else (twin, pipe)
    unload_perflow(one)
    assert is_base(one, base, bits) and isinstance(other.scheduler, PeRFlowScheduler)
    with pytest.warns(UserWarning, match="taken out through another pipeline"):
        other.scheduler.set_timesteps(4)
    with pytest.raises(ArtifactError, match="taken out through another pipeline"):
        export_pipeline(other, tmp_path / "x", licence="mit")
    unload_perflow(other)
    assert is_base(other, base, bits)


def test_an_image_to_image_twin_outlives_its_original_and_watches_on(accelerators):
    pipe = load_miniature()
    load_perflow(pipe, "miniature")
    twin = AutoPipelineForImage2Image.from_pipe(pipe)
    del pipe
    gc.collect()
    unmerge_delta(twin)
    with pytest.warns(UserWarning, match="taken out by `unmerge_delta`"):
        twin.scheduler.set_timesteps(4)
    unload_perflow(twin)
    assert type(twin.scheduler) is DDIMScheduler


@FORMS
@pytest.mark.parametrize("kept", [True, False], ids=["old unet kept", "old unet gone"])
def test_a_unet_that_its_own_copy_replaces_is_unloaded(weights, kept, pipe, base, bits):
    picture, old = draw(pipe), pipe.unet if kept else None
    pipe.unet = copy.deepcopy(pipe.unet)
    gc.collect()
    assert np.array_equal(draw(pipe), picture)
    unload_perflow(pipe)
    assert is_base(pipe, base, bits) and np.array_equal(draw(pipe), base[1])
    assert old is None or not bits.same(bits.copy(old), base[0])


@FORMS
def test_a_new_checkpoint_in_its_place_is_seen_and_nothing_is_taken_out_of_it(weights, pipe, bits):
    pipe.unet = make_pipe("sd", seed=3).unet
    before, ours = bits.copy(pipe.unet), pipe.scheduler
    with pytest.warns(UserWarning, match="another one than they were loaded into"):
        draw(pipe)
    draw(pipe)  # said once
    with pytest.raises(ArtifactError, match=r"no longer in this pipeline.*force=True"):
        unload_perflow(pipe)
    assert pipe.scheduler is ours
    with pytest.raises(ArtifactError, match="is loaded into this pipeline"):
        load_perflow(pipe, "miniature")
    with pytest.raises(ArtifactError, match="no strength to set"):
        set_perflow_scale(pipe, 0.5)
    unload_perflow(pipe, force=True)
    assert bits.same(bits.copy(pipe.unet), before) and type(pipe.scheduler) is DDIMScheduler


def test_a_scheduler_that_was_only_set_goes_with_every_copy():
    pipe = make_pipe("sd")
    pipe.register_to_config(_name_or_path="hansyan/perflow-sd15-disney")
    set_scheduler(pipe)
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)), copy.copy(pipe)):
        unload_perflow(twin)
        assert type(twin.scheduler) is DDIMScheduler and isinstance(pipe.scheduler, PeRFlowScheduler)


def test_a_scheduler_copied_for_another_thread_draws_the_same_and_accuses_nobody(accelerators):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder)
    picture = draw(pipe)
    own = copy.deepcopy(pipe.components)
    twin = type(pipe)(**own, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    unload_perflow(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert np.array_equal(draw(twin), picture)
    unload_perflow(twin)


def test_a_pipeline_that_copies_what_is_in_its_scheduler_is_watched_and_unloaded_as_before(accelerators, base, bits):
    pipe = make_pipe("sd")
    former = pipe.scheduler
    load_perflow(pipe, accelerators["sd"].folder)
    for _ in range(3):  # as StableDiffusionPanoramaPipeline does for every view
        pipe.scheduler.__dict__.update(copy.deepcopy(pipe.scheduler.__dict__))
    unmerge_delta(pipe)
    with pytest.warns(UserWarning, match="taken out by `unmerge_delta`"):
        draw(pipe)
    unload_perflow(pipe)
    assert is_base(pipe, base, bits) and pipe.scheduler.config == former.config


def test_copies_do_not_share_the_scheduler_that_they_get_back(accelerators):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder)
    twin = copy.deepcopy(pipe)
    for one in (twin, pipe):
        unload_perflow(one)
    assert pipe.scheduler is not twin.scheduler and pipe.scheduler.config == twin.scheduler.config


def test_a_handle_and_its_unet_are_copied_together(accelerators, base, bits):
    pipe = make_pipe("sd")
    handle = merge_delta(pipe, accelerators["sd"].delta)
    merged = bits.copy(pipe.unet)
    for pair in ((pipe.unet, handle), (handle, pipe.unet)):
        twins = copy.deepcopy(pair)
        unet, twin = twins if pair[0] is pipe.unet else twins[::-1]
        assert twin.active and twin.scale == 1
        twin.undo()
        assert bits.same(bits.copy(unet), base[0]) and bits.same(bits.copy(pipe.unet), merged) and handle.active
    alone = pickle.loads(pickle.dumps(handle))
    assert not alone.active and alone.metadata == handle.metadata and str(alone.report) == str(handle.report)
    with pytest.raises(MergeError, match="no longer exists"):
        alone.undo()
    handle.undo()
    assert bits.same(bits.copy(pipe.unet), base[0])


def test_weights_plans_and_artifacts_are_copied_and_pickled(accelerators, tmp_path):
    unet, delta = make_pipe("sd").unet, open_weights(accelerators["sd"].delta)
    compute_delta(unet, make_pipe("sd", seed=1).unet, tmp_path / "shards", max_shard_size=4096)
    sources = [
        delta,
        open_weights(accelerators["sd"].lora),
        open_weights(tmp_path / "shards"),
        open_weights(dict(delta)),
        open_weights(unet),
        compute_delta(unet, make_pipe("sd", seed=1).unet),
        plan_merge(unet, delta).source,
        PeRFlowArtifact.from_header(accelerators["sd"].delta).files["delta"],
    ]
    for source in sources:
        for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
            assert type(twin) is type(source) and list(twin) == list(source) and twin.metadata == source.metadata
            assert (twin.kind, twin.files, twin.dtypes) == (source.kind, source.files, source.dtypes)
            assert all(torch.equal(twin[name], source[name]) for name in source)
            with pytest.raises(TypeError):
                twin.shapes["new"] = ()
    plan = plan_merge(unet, delta)
    for twin in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert (twin.edits, twin.fingerprint, twin.largest) == (plan.edits, plan.fingerprint, plan.largest)
    artifact = PeRFlowArtifact.from_folder(accelerators["sd"].folder)
    for twin in (copy.deepcopy(artifact), pickle.loads(pickle.dumps(artifact))):
        assert twin == artifact


@pytest.mark.parametrize("compact", ["lora", "int8"])
def test_a_pickled_merge_rebuilds_the_same_numbers_of_a_compact_form(compact, accelerators, tmp_path):
    file = accelerators["sd"].lora
    if compact == "int8":
        file = tmp_path / "int8.safetensors"
        shrink_delta(accelerators["sd"].delta, file, "int8")
    plan = plan_merge(make_pipe("sd").unet, file)
    twin = pickle.loads(pickle.dumps(plan)).source
    assert twin.partial == (compact == "lora") and set(twin) == set(plan.source)
    assert all(torch.equal(twin[name], plan.source[name]) for name in plan.source)


def test_a_changed_strength_of_the_merge_alone_is_no_fault_of_a_delta(accelerators):
    pipe = make_pipe("sd")
    load_perflow(pipe, accelerators["sd"].folder)
    set_delta_scale(pipe, 0.5)
    picture = draw(pipe)
    set_perflow_scale(pipe, 1.0)
    set_perflow_scale(pipe, 0.5)
    assert np.array_equal(draw(pipe), picture)
    unload_perflow(pipe)
