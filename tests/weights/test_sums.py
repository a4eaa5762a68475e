"""Sums at the end of a dtype's range, and what the weights' rounding leaves of a delta, against float64."""

import warnings

import pytest
import torch

from perflow_diffusers.weights import MergeError, merge_delta, merge_files, open_weights, plan_merge

NAME = "mid_block.resnets.0.conv1.weight"


def one_number(delta, value, dtype=None):
    """The delta with one number in one tensor, the others zero."""
    changed = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in delta.items()}
    changed[NAME].view(-1)[7] = value
    return changed


@pytest.fixture
def heavy(make_unet):
    """A UNet in fp16 with one weight of 40000."""
    unet = make_unet(torch.float16)
    unet.state_dict()[NAME].view(-1)[7] = 40000.0
    return unet


def test_a_sum_that_overflows_is_refused_and_nothing_changes(heavy, delta, bits, same, tmp_path):
    before, large = bits(heavy), one_number(delta, 30000.0)
    for backup in ("cpu", "disk", "none"):
        with pytest.raises(MergeError, match=rf"overflow float16 in 1 tensors: {NAME}.*smaller scale.*float32"):
            merge_delta(heavy, large, backup=backup)
        assert same(bits(heavy), before)
    with pytest.raises(MergeError, match="overflow"):
        plan_merge(heavy, large)
    with pytest.raises(MergeError, match="overflow"):
        merge_files(heavy, large, tmp_path / "out.safetensors", dry_run=True)
    with pytest.raises(MergeError, match="overflow"):
        merge_files(heavy, large, tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())
    merge_delta(heavy, large, -1).undo()  # 10000 is fine
    merge_delta(heavy, large, 0.8)  # 64000, too
    assert heavy.state_dict()[NAME].view(-1)[7] == 64000


def test_rescaling_stacking_and_undoing_are_checked_too(heavy, delta, bits, same):
    lower = merge_delta(heavy, one_number(delta, -30000.0))
    upper = merge_delta(heavy, one_number(delta, 29984.0))
    merged = bits(heavy)
    with pytest.raises(MergeError, match="overflow"):
        lower.set_scale(0)
    with pytest.raises(MergeError, match="overflow"):
        upper.set_scale(2)
    with pytest.raises(MergeError, match="overflow"):
        merge_delta(heavy, one_number(delta, 30016.0))
    assert same(bits(heavy), merged) and (lower.scale, upper.scale) == (1, 1)
    upper.set_scale(-1)
    lower.set_scale(-0.5)
    kept = bits(heavy)
    upper.set_scale(-1.5)
    lower.set_scale(-2)
    with pytest.raises(MergeError, match="overflow"):
        upper.undo()
    assert upper.active
    lower.set_scale(-0.5)
    upper.set_scale(-1)
    assert same(bits(heavy), kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_last_number_of_a_dtype_is_still_reached(make_unet, delta, dtype):
    unet, most = make_unet(dtype), torch.finfo(dtype).max
    weight = unet.state_dict()[NAME].view(-1)
    weight[7] = most / 2
    with merge_delta(unet, one_number(delta, most / 2, torch.float32)):
        assert weight[7] == most
    weight[7] = most
    step = most * torch.finfo(dtype).eps / 2  # about one step at the end of the range
    with merge_delta(unet, one_number(delta, step / 4, torch.float32)):
        assert weight[7] == most  # rounded back
    with pytest.raises(MergeError, match=str(dtype).removeprefix("torch.")):
        merge_delta(unet, one_number(delta, step * 0.8, torch.float32))
    assert weight[7] == most


def test_weights_that_are_infinite_already_are_left_alone(heavy, delta, bits, same):
    heavy.state_dict()[NAME].view(-1)[7] = float("inf")
    before = bits(heavy)
    merge_delta(heavy, one_number(delta, 100.0)).undo()
    assert same(bits(heavy), before)


def exactly_kept(before, after, terms):
    """1 - |kept - wanted|^2 / |wanted|^2 over every number, in float64."""
    lost = total = 0.0
    for name, old in before.items():
        wanted = sum(scale * delta[name].double() for scale, delta in terms)
        total += wanted.square().sum().item()
        lost += (after[name].double() - old.double() - wanted).square().sum().item()
    return 1 - lost / total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("backup", ["cpu", "none"])
def test_the_share_that_rounding_kept(make_unet, make_delta, bits, dtype, size, backup):
    unet = make_unet(dtype)
    delta, before = make_delta(unet, torch.float32, size=size), bits(unet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = merge_delta(unet, delta, 0.8, backup=backup).report
    wanted = exactly_kept(before, bits(unet), [(0.8, delta)])
    assert report.kept == pytest.approx(wanted, abs=0.03)
    low = [warning for warning in caught if "was kept by weights in" in str(warning.message)]
    assert len(low) == (1 if wanted < 0.5 else 0) and all(warning.filename == __file__ for warning in low)
    assert ("kept by the weights' dtype" in str(report)) == (report.kept < 0.99)
    assert {(torch.float32, 1e-4): wanted > 0.999, (torch.bfloat16, 1e-4): wanted < 0.5}.get((dtype, size), True)


def test_the_share_of_a_stack_a_file_and_wider_inputs(make_unet, make_delta, bits, tmp_path):
    unet = make_unet(torch.bfloat16, in_channels=9)
    given = [make_delta(make_unet(), seed=seed, size=0.002) for seed in (1, 2)]
    first, second = (
        {**delta, "conv_in.weight": torch.nn.functional.pad(delta["conv_in.weight"], (0, 0, 0, 0, 0, 5))}
        for delta in given
    )
    before, out = bits(unet), tmp_path / "out.safetensors"
    report = merge_files(unet, given[0], out)
    assert report.kept == pytest.approx(exactly_kept(before, dict(open_weights(out)), [(1, first)]), abs=0.03)
    merge_delta(unet, given[0])
    handle = merge_delta(unet, given[1], 0.5)
    wanted = exactly_kept(before, bits(unet), [(1, first), (0.5, second)])
    assert handle.report.kept == pytest.approx(wanted, abs=0.03)


def test_a_rescale_warns_too(make_unet, make_delta):
    unet = make_unet(torch.bfloat16)
    handle = merge_delta(unet, make_delta(make_unet()))
    with pytest.warns(
        UserWarning, match=r"Only \d+ % of a state dict x 0.01 was kept by weights in bfloat16.*float32"
    ):
        handle.set_scale(0.01)


def test_a_zero_scale_has_nothing_to_lose(make_unet, make_delta):
    assert merge_delta(make_unet(torch.bfloat16), make_delta(make_unet(), size=1e-6), 0).report.kept == 1
