"""A merge that is interrupted, or fails in its middle: all old or all new."""

import signal
from types import SimpleNamespace

import pytest
import torch
from test_merge import expected, mismatches

from perflow_diffusers.weights import MergeError, merge_delta, unmerge_delta
from perflow_diffusers.weights.merge import layers as stack


@pytest.fixture
def ordinary_ctrl_c():
    """Python's own SIGINT handler; a test run that a shell started in the background ignores the signal instead."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_disk_backup_that_does_not_fit_changes_nothing(unet, delta, bits, same, tmp_path, monkeypatch):
    monkeypatch.setattr(stack.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    before = bits(unet)
    with pytest.raises(ValueError, match=r"needs .* bytes"):
        merge_delta(unet, delta, backup="disk")
    assert same(bits(unet), before) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("depth", [0, 1])
def test_interruption_in_the_middle_restores_every_bit(make_unet, make_delta, bits, same, monkeypatch, error, depth):
    unet = make_unet(torch.float16)
    if depth:
        merge_delta(unet, make_delta(unet, seed=5), scale=0.7)
    before, real, calls = bits(unet), stack.write_weight, []

    def fail_in_the_middle(weight, base, terms):
        calls.append(weight)
        real(weight, base, terms)
        if len(calls) == 100:
            raise error("stop")

    monkeypatch.setattr(stack, "write_weight", fail_in_the_middle)
    with pytest.raises(error):
        merge_delta(unet, make_delta(unet))
    assert len(calls) == 200 and same(bits(unet), before)
    assert len(stack.stack_of(unet).layers) == depth
    merge_delta(unet, make_delta(unet)).undo()
    assert same(bits(unet), before)


@pytest.mark.usefixtures("ordinary_ctrl_c")
@pytest.mark.parametrize("backup", ["cpu", "none"])
@pytest.mark.parametrize("press_at", [50, 208])
def test_ctrl_c_leaves_all_old_or_all_new(make_unet, make_delta, bits, same, monkeypatch, backup, press_at):
    unet = make_unet(torch.float16)
    delta, before, real, calls = make_delta(unet), bits(unet), stack.write_weight, []
    new = expected(before, [(1.0, delta)], torch.float16)
    assert len(delta) == 208

    def press(weight, base, terms):
        calls.append(weight)
        if len(calls) == press_at:
            signal.raise_signal(signal.SIGINT)
        real(weight, base, terms)

    monkeypatch.setattr(stack, "write_weight", press)
    with pytest.raises(KeyboardInterrupt):
        merge_delta(unet, delta, backup=backup)
    if backup == "none":
        assert mismatches(bits(unet), new) == 0
    elif stack.stack_of(unet).layers:
        assert mismatches(bits(unet), new) == 0
        unmerge_delta(unet)
        assert same(bits(unet), before)
    else:
        assert same(bits(unet), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ordinary_ctrl_c")
def test_a_programs_own_interrupt_handler_waits_for_the_merge(make_unet, make_delta, bits, same, monkeypatch):
    """Notebooks and servers replace Python's: an exception from theirs would tear the merge just the same."""
    unet = make_unet(torch.float16)
    delta, before, real, seen = make_delta(unet), bits(unet), stack.write_weight, []

    def handler(number, frame):
        seen.append(same(bits(unet), before))
        raise RuntimeError("stopped by the program")

    def press(weight, base, terms):
        if weight is unet.conv_out.weight and not seen:
            signal.raise_signal(signal.SIGINT)
        real(weight, base, terms)

    monkeypatch.setattr(stack, "write_weight", press)
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(RuntimeError, match="by the program"):
        merge_delta(unet, delta)
    assert seen == [False] and signal.getsignal(signal.SIGINT) is handler
    assert mismatches(bits(unet), expected(before, [(1.0, delta)], torch.float16)) == 0
    unmerge_delta(unet)
    assert same(bits(unet), before)


def test_failure_without_backup_says_so(unet, delta, monkeypatch):
    def fail(weight, base, terms):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(stack, "write_weight", fail)
    with pytest.raises(MergeError, match="Load the model again"):
        merge_delta(unet, delta, backup="none")
