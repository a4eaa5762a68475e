"""An fp32 base and an fp16 tuned model: the difference without the base's rounding, and when to ask for it."""

import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import (
    DeltaError,
    check_delta,
    compute_delta,
    content_hash,
    describe_weights,
    merge_delta,
)

COARSE = [torch.float16, torch.bfloat16]


def tune(base, dtype, change, trained=""):
    """A model tuned from `base`, stored in `dtype`: weights whose names begin with `trained` change by that share."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: (
            value.double()
            * (1 + change * torch.randn(value.shape, generator=generator).double() * name.startswith(trained))
        ).to(dtype)
        for name, value in base.items()
    }


@pytest.mark.parametrize("dtype", COARSE)
@pytest.mark.parametrize("stored", [None, torch.float32])
def test_the_difference_is_that_of_a_base_in_the_tuned_dtype(make_unet, tmp_path, dtype, stored):
    base = make_unet().state_dict()
    tuned = tune(base, dtype, 0.1)
    compute_delta(base, tuned, tmp_path / "d.safetensors", stored, round_base=True)
    found, wanted = (
        load_file(tmp_path / "d.safetensors"),
        compute_delta({name: value.to(dtype) for name, value in base.items()}, tuned, dtype=stored),
    )
    for name, value in base.items():
        exact = tuned[name].double() - value.to(dtype).double()
        assert torch.equal(found[name], exact.to(found[name].dtype)) and torch.equal(found[name], wanted[name])
        assert found[name].dtype == (stored or dtype)


@pytest.mark.parametrize("dtype", COARSE)
def test_merged_into_a_base_of_that_dtype_it_is_the_tuned_model(make_unet, dtype):
    unet = make_unet()
    base = {name: value.clone() for name, value in unet.state_dict().items()}
    tuned = tune(base, dtype, 0.3)
    delta = compute_delta(base, tuned, dtype=torch.float32, round_base=True)
    coarse = unet.to(dtype)
    with merge_delta(coarse, delta):
        assert all(torch.equal(value, tuned[name]) for name, value in coarse.state_dict().items())


def test_header_hash_and_dry_run(make_unet, tmp_path):
    base = make_unet().state_dict()
    tuned = tune(base, torch.float16, 0.05)
    tuned["conv_in.bias"], tuned["conv_out.bias"] = tuned["conv_in.bias"].float(), tuned["conv_out.bias"].bfloat16()
    delta = compute_delta(base, tuned, tmp_path / "d.safetensors", round_base=True)
    assert delta.metadata["base_rounded"] == "BF16,F16" and delta.metadata["base_hash"] == content_hash(base)
    assert describe_weights(tmp_path / "d.safetensors").settings["base_rounded"] == "BF16,F16"
    assert torch.equal(delta["conv_in.bias"], tuned["conv_in.bias"] - base["conv_in.bias"])
    assert "(rounded to BF16,F16)" in check_delta(base, tuned, round_base=True)
    assert "rounded" not in check_delta(base, tuned) + check_delta(tuned, base, round_base=True)
    for first, second, rounding in ((base, tuned, False), (tuned, base, True), (base, dict(base), True)):
        assert "base_rounded" not in compute_delta(first, second, round_base=rounding).metadata
    with pytest.raises(DeltaError, match="base_rounded"):
        compute_delta(base, tuned, metadata={"base_rounded": "no"})


@pytest.mark.parametrize("dtype", COARSE)
def test_what_was_not_trained_is_dropped(make_unet, tmp_path, dtype):
    """Only one block is tuned: all else is rounding, of which a tenth of the numbers is enough to say so."""
    base = make_unet().state_dict()
    tuned = tune(base, dtype, 0.2, "mid_block")
    with pytest.warns(UserWarning, match=r"stored more coarsely.*all of it in \d+ % of the numbers\. round_base=True"):
        noisy = compute_delta(base, tuned, tmp_path / "noisy.safetensors", drop_identical=True)
    delta = compute_delta(base, tuned, tmp_path / "d.safetensors", drop_identical=True, round_base=True)
    assert set(delta) == {name for name in base if name.startswith("mid_block")} < set(noisy)
    assert set(delta.metadata["identical"].split()) == set(base) - set(delta)


def test_it_says_when_it_is_needed_and_how_much(make_unet):
    base = make_unet().state_dict()
    tuned = tune(base, torch.bfloat16, 2e-4)
    with pytest.warns(UserWarning, match=r"\d+ % of its squared norm") as caught:
        compute_delta(base, tuned)
    before = sum((tuned[name].double() - value.double()).square().sum() for name, value in base.items())
    after = sum((tuned[name].double() - value.bfloat16().double()).square().sum() for name, value in base.items())
    said = re.search(r"(\d+) % of its squared norm", str(caught[0].message))
    assert said and abs(int(said[1]) - 100 * (1 - after / before)) < 1 and caught[0].filename == __file__


@pytest.mark.parametrize(("dtype", "change"), [(torch.float16, 0.01), (torch.float16, 3e-3), (torch.bfloat16, 0.03)])
def test_an_ordinary_difference_is_made_in_silence(make_unet, dtype, change):
    base = make_unet().state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_delta(base, tune(base, dtype, change))
        compute_delta({name: value.to(dtype) for name, value in base.items()}, tune(base, torch.float32, 1e-4))


def test_a_base_that_overflows_when_rounded_is_named(make_unet, tmp_path):
    base = make_unet().state_dict()
    tuned = tune(base, torch.float16, 0.05)
    base["conv_in.bias"][0] = 1e5
    save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(DeltaError, match=r"conv_in\.bias of the base.*torch\.float16.*round_base off"):
        compute_delta(tmp_path / "base.safetensors", tuned, tmp_path / "d.safetensors", round_base=True)
    assert not (tmp_path / "d.safetensors").exists()
