"""Merging: one rounding, every bit back, stacks, scales, and what a UNet with merges can still do."""

import copy
import gc
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perflow_diffusers.weights import MergeError, merge_delta, plan_merge, set_delta_scale, unmerge_delta
from perflow_diffusers.weights.merge import layers as stack
from perflow_diffusers.weights.merge import sums

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expected(base, terms, dtype):
    """round(base + sum s * delta), computed in float64."""
    total = {name: weight.double() for name, weight in base.items()}
    for scale, delta in terms:
        total = {name: value + scale * delta[name].double() for name, value in total.items()}
    return {name: value.to(dtype) for name, value in total.items()}


def mismatches(found, wanted):
    return sum((found[name] != wanted[name]).sum().item() for name in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backup", ["cpu", "disk"])
def test_every_bit_returns_after_many_cycles(make_unet, make_delta, bits, same, dtype, backup):
    unet = make_unet(dtype)
    delta = make_delta(unet)
    before = bits(unet)
    for cycle in range(60 if backup == "cpu" else 5):
        handle = merge_delta(unet, delta, scale=1.0 if cycle % 2 else 0.7, backup=backup)
        assert not same(bits(unet), before)
        if cycle % 3 == 0:
            set_delta_scale(unet, 0.3)
        handle.undo()
    assert same(bits(unet), before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", DTYPES)
def test_full_scale_is_one_rounding_of_the_exact_sum(make_unet, make_delta, bits, dtype, delta_dtype):
    unet = make_unet(dtype)
    delta = make_delta(unet, delta_dtype)
    before = bits(unet)
    merge_delta(unet, delta)
    wanted = expected(before, [(1.0, delta)], dtype)
    count = sum(weight.numel() for weight in before.values())
    assert mismatches(bits(unet), wanted) <= (0 if torch.float32 not in (dtype, delta_dtype) else 2e-4 * count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stack_is_rounded_once(make_unet, make_delta, bits, dtype):
    unet = make_unet(dtype)
    first, second = make_delta(unet, seed=1), make_delta(unet, seed=2)
    before = bits(unet)
    merge_delta(unet, first, scale=0.7)
    merge_delta(unet, second, scale=-0.3)
    wanted = expected(before, [(0.7, first), (-0.3, second)], dtype)
    found, count = bits(unet), sum(weight.numel() for weight in before.values())
    if dtype == torch.float32:
        assert all(torch.allclose(found[name], wanted[name], rtol=3e-7, atol=1e-8) for name in wanted)
    else:
        twice = expected(expected(before, [(0.7, first)], dtype), [(-0.3, second)], dtype)
        assert mismatches(twice, wanted) > 0.05 * count
        assert mismatches(found, wanted) < 0.003 * count  # fp32 sums that fall on the other side of a tie


def test_a_stack_comes_off_in_order_and_to_the_bit(make_unet, make_delta, bits, same):
    unet = make_unet(torch.float16)
    states = [bits(unet)]
    handles = []
    for seed, scale in ((1, 1.0), (2, 0.7), (3, -1.5)):
        handles.append(merge_delta(unet, make_delta(unet, seed=seed), scale=scale))
        states.append(bits(unet))
    with pytest.raises(MergeError, match="not the last merge"):
        handles[0].undo()
    assert same(bits(unet), states[3])
    unmerge_delta(unet)
    assert same(bits(unet), states[2])
    handles[1].undo()
    assert same(bits(unet), states[1])
    assert [handle.active for handle in handles] == [True, False, False]
    unmerge_delta(unet)
    assert same(bits(unet), states[0])
    assert not stack.stack_of(unet).base


def test_scales_do_not_drift(make_unet, make_delta, bits, same):
    unet = make_unet(torch.float16)
    before = bits(unet)
    first, second = make_delta(unet, seed=1), make_delta(unet, seed=2)
    lower = merge_delta(unet, first, 0.5)
    merge_delta(unet, second, 0.5)
    wanted = bits(unet)
    for scale in (0.1, 0.9, 1.0, -2, 0.5):
        set_delta_scale(unet, scale)
        lower.set_scale(scale)
    assert same(bits(unet), wanted)
    assert lower.scale == 0.5
    set_delta_scale(unet, 0)
    lower.set_scale(0)
    assert same(bits(unet), before)


def test_pipeline_context_manager_and_report(unet, delta_file, bits, same):
    pipe = SimpleNamespace(unet=unet)
    before = bits(unet)
    with merge_delta(pipe, str(delta_file), scale=0.5) as handle:
        assert handle.active and handle.scale == 0.5 and handle.backup == "cpu"
        assert handle.metadata["prediction_type"] == "ddim_eps" and handle.metadata["steps"] == "4"
        assert handle.report.changed == len(before) and handle.report.untouched == ()
        assert "delta.safetensors x 0.5" in str(handle.report)
        assert not same(bits(unet), before)
    assert same(bits(unet), before)
    assert not handle.active and handle.scale == 0
    with pytest.raises(MergeError, match="undone before"):
        handle.undo()
    with pytest.raises(RuntimeError, match="mine"), merge_delta(pipe, delta_file):
        raise RuntimeError("mine")
    assert same(bits(unet), before)


def test_without_backup_nothing_can_be_undone(make_unet, make_delta, bits):
    unet = make_unet(torch.float16)
    delta, before = make_delta(unet), bits(unet)
    handle = merge_delta(unet, delta, backup="none")
    assert mismatches(bits(unet), expected(before, [(1.0, delta)], torch.float16)) == 0
    assert handle.scale == 1 and not handle.active
    for act in (handle.undo, lambda: unmerge_delta(unet), lambda: set_delta_scale(unet, 0.5)):
        with pytest.raises(MergeError, match="backup='none'"):
            act()
    after = bits(unet)
    merge_delta(unet, make_delta(unet, seed=2))
    with pytest.raises(MergeError, match="useless"):
        merge_delta(unet, make_delta(unet, seed=3), backup="none")
    unmerge_delta(unet)
    assert mismatches(bits(unet), after) == 0


def test_disk_backup_is_deleted(unet, delta, tmp_path, monkeypatch):
    monkeypatch.setattr(stack.tempfile, "tempdir", str(tmp_path))
    handle = merge_delta(unet, delta, backup="disk")
    assert len(list(tmp_path.glob("perflow-backup-*/base.safetensors"))) == 1
    handle.undo()
    gc.collect()
    assert not list(tmp_path.glob("perflow-backup-*"))


def test_merging_twice_warns_and_does_it(make_unet, make_delta, bits, same, delta_file):
    unet = make_unet()
    merge_delta(unet, delta_file)
    with pytest.warns(UserWarning, match="merged into this UNet already"):
        merge_delta(unet, make_delta(unet))
    unmerge_delta(unet)
    unmerge_delta(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_delta(unet, delta_file)
    with pytest.warns(UserWarning, match="already"):
        merge_delta(unet, delta_file)


def test_unmerging_without_a_merge(unet):
    for act in (lambda: unmerge_delta(unet), lambda: set_delta_scale(unet, 1)):
        with pytest.raises(MergeError, match="Call `merge_delta` first"):
            act()


def test_changes_by_others_are_seen_and_not_overwritten(make_unet, make_delta, bits, same):
    unet = make_unet(torch.float16)
    before = bits(unet)
    merge_delta(unet, make_delta(unet))
    changed = dict(unet.named_parameters())["mid_block.resnets.0.conv1.weight"]
    changed.data += 0.01
    touched = bits(unet)
    for act in (
        lambda: unmerge_delta(unet),
        lambda: set_delta_scale(unet, 2),
        lambda: merge_delta(unet, make_delta(unet, seed=7)),
    ):
        with pytest.raises(MergeError, match="have changed since the merge"):
            act()
        assert same(bits(unet), touched)
    unmerge_delta(unet, force=True)
    assert same(bits(unet), before)


def test_undo_after_a_cast(make_unet, make_delta, bits, same):
    unet = make_unet(torch.float32)
    base = bits(unet)
    handle = merge_delta(unet, make_delta(unet))
    unet.to(torch.bfloat16)
    set_delta_scale(unet, 0.5)
    handle.undo()
    assert same(bits(unet), {name: weight.to(torch.bfloat16) for name, weight in base.items()})


def test_deepcopy_save_and_pickle(unet, delta, bits, same, tmp_path):
    before = bits(unet)
    merge_delta(unet, delta)
    merged = bits(unet)
    twin = copy.deepcopy(unet)
    unmerge_delta(twin)
    assert same(bits(twin), before) and same(bits(unet), merged)
    unet.save_pretrained(tmp_path / "saved")
    loaded = type(unet).from_pretrained(tmp_path / "saved")
    assert same(bits(loaded), merged)
    with pytest.raises(MergeError, match="Nothing is merged"):
        unmerge_delta(pickle.loads(pickle.dumps(unet)))
    unmerge_delta(unet)
    assert same(bits(unet), before)


def test_the_handle_does_not_keep_the_unet_alive(make_unet, make_delta):
    unet = make_unet()
    handle = merge_delta(unet, make_delta(unet))
    del unet
    gc.collect()
    assert not handle.active
    with pytest.raises(MergeError, match="no longer exists"):
        handle.undo()


def test_channels_last_and_inference_tensors(make_unet, make_delta, bits, same):
    unet = make_unet(torch.float16).to(memory_format=torch.channels_last)
    before, delta = bits(unet), make_delta(unet)
    for scale in (1.0, 0.75):
        with merge_delta(unet, delta, scale):
            assert mismatches(bits(unet), expected(before, [(scale, delta)], torch.float16)) == 0
            assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert same(bits(unet), before)
    with torch.inference_mode():
        handle = merge_delta(unet, delta)
    handle.undo()
    assert same(bits(unet), before)
    with torch.inference_mode():
        frozen = make_unet(torch.float16)
    before = bits(frozen)
    merge_delta(frozen, delta).undo()
    assert same(bits(frozen), before)


def test_slices_and_whole_tensors_round_alike(make_delta, monkeypatch):
    torch.manual_seed(0)
    base = torch.randn(64, 33, 3, 3).half()
    delta = (torch.randn(64, 33, 3, 3) * 0.01).half()
    results = []
    for chunk in (1, 1000, 1 << 20):
        monkeypatch.setattr(sums, "_CHUNK", chunk)
        weight = base.clone()
        stack.write_weight(weight, None, [(0.7, delta, None), (0.3, delta, None)])
        results.append(weight)
    assert all(torch.equal(result, results[0]) for result in results)


def test_scalars_and_empty_tensors():
    for shape in ((), (0,), (0, 3), (1,)):
        weight = torch.ones(shape).half()
        stack.write_weight(weight, None, [(0.5, torch.ones(shape), None)])
        assert weight.shape == shape and (weight == 1.5).all()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "strong", None])
def test_scale_must_be_finite(unet, delta, bits, same, scale):
    before = bits(unet)
    with pytest.raises(MergeError, match="not a finite number"):
        merge_delta(unet, delta, scale=scale)
    assert same(bits(unet), before)


@pytest.mark.filterwarnings("ignore:scale=.* is far from")
def test_overflow_is_refused(make_unet, make_delta, bits, same):
    unet = make_unet(torch.float16)
    before = bits(unet)
    with pytest.raises(MergeError, match="overflow"):
        merge_delta(unet, make_delta(unet, torch.float32), scale=1e7)
    handle = merge_delta(unet, make_delta(unet))
    with pytest.raises(MergeError, match="overflow"):
        handle.set_scale(1e7)
    handle.undo()
    assert same(bits(unet), before)


def test_unknown_options(unet, delta):
    with pytest.raises(MergeError, match="backup='gpu'"):
        merge_delta(unet, delta, backup="gpu")
    with pytest.raises(MergeError, match="conv_in='crop'"):
        plan_merge(unet, delta, conv_in="crop")


def test_the_plan_changes_nothing(unet, delta, bits, same):
    before = bits(unet)
    plan = plan_merge(unet, delta)
    assert same(bits(unet), before) and len(plan.edits) == len(before) and plan.untouched == ()
    assert plan.largest == max(value.abs().max().item() for value in delta.values())
    assert "_perflow_merges" not in unet.__dict__


def test_a_path_that_is_gone_after_the_merge(make_unet, make_delta, bits, same, delta_file):
    unet = make_unet(torch.float16)
    before = bits(unet)
    merge_delta(unet, Path(delta_file))
    delta_file.unlink()
    set_delta_scale(unet, 0.5)
    unmerge_delta(unet)
    assert same(bits(unet), before)
