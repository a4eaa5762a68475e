"""Deltas of transformers of any family, by names and shapes alone: exact sums, every bit back, files and folders."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flow_builders import FLOW
from safetensors.torch import load_file, save_file

from perflow_diffusers import compute_delta, load_perflow, merge_delta, open_weights, set_delta_scale, unmerge_delta
from perflow_diffusers.errors import ArtifactError, MergeError, WeightSourceError
from perflow_diffusers.weights import merge_files

ONE_EACH = (
    *("sd3-text-to-image", "flux-text-to-image", "qwen-image", "z-image", "sana"),
    *("wan-text-to-video", "ltx-text-to-video"),
)


def bits(module):
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}


def fine_tuned(transformer):
    """A copy of a transformer whose every weight has moved."""
    other = copy.deepcopy(transformer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=generator)
    return other


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_delta_of_two_transformers_turns_one_into_the_other_and_back(name, tmp_path):
    pipe = FLOW[name](None).pipe
    base, other = pipe.transformer, fine_tuned(pipe.transformer)
    before = bits(base)
    compute_delta(base, other, tmp_path / "delta.safetensors", dtype="float32")
    delta = load_file(tmp_path / "delta.safetensors")
    assert {part: each.shape for part, each in delta.items()} == {part: each.shape for part, each in before.items()}
    for part, weight in other.named_parameters():
        assert torch.equal(delta[part], (weight.double() - before[part].double()).float())

    merge_delta(pipe, tmp_path / "delta.safetensors")
    for part, weight in base.named_parameters():
        assert torch.equal(weight, before[part] + delta[part]), part
    set_delta_scale(pipe, 0.5)
    for part, weight in base.named_parameters():
        exact = before[part].double() + 0.5 * delta[part].double()
        assert torch.equal(weight, exact.float()), part
    unmerge_delta(pipe)
    assert all(torch.equal(weight, before[part]) for part, weight in bits(base).items())


@pytest.mark.parametrize("name", ONE_EACH)
def test_from_folder_to_folder(name, tmp_path):
    """Sharded as diffusers shards: what comes out loads there, and is the sum."""
    pipe = FLOW[name](None).pipe
    base, other = pipe.transformer, fine_tuned(pipe.transformer)
    base.save_pretrained(tmp_path / "base" / "transformer", max_shard_size="20KB")
    other.save_pretrained(tmp_path / "other" / "transformer", max_shard_size="20KB")
    compute_delta(tmp_path / "base", tmp_path / "other", tmp_path / "delta.safetensors", dtype="float32")
    merge_files(tmp_path / "base", tmp_path / "delta.safetensors", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    delta = load_file(tmp_path / "delta.safetensors")
    for part, weight in merged.named_parameters():
        assert torch.equal(weight, base.get_parameter(part) + delta[part]), part


def test_another_family_s_delta_is_refused_and_nothing_changed(tmp_path):
    sd3, flux = FLOW["sd3-text-to-image"](None).pipe, FLOW["flux-text-to-image"](None).pipe
    compute_delta(flux.transformer, fine_tuned(flux.transformer), tmp_path / "flux.safetensors")
    before = bits(sd3.transformer)
    with pytest.raises(MergeError, match="does not fit the model; nothing was changed"):
        merge_delta(sd3, tmp_path / "flux.safetensors")
    assert all(torch.equal(weight, before[part]) for part, weight in bits(sd3.transformer).items())


def test_a_unet_s_delta_is_refused(tiny_components, tmp_path):
    sd3, unet = FLOW["sd3-text-to-image"](None).pipe, tiny_components[0]
    save_file({name: 0.1 * torch.ones_like(weight) for name, weight in unet.state_dict().items()}, tmp_path / "unet")
    (tmp_path / "unet").rename(tmp_path / "unet.safetensors")
    with pytest.raises(MergeError, match="nothing was changed"):
        merge_delta(sd3, tmp_path / "unet.safetensors")


def test_of_two_transformers_one_has_to_be_named(tmp_path):
    pipe = FLOW["wan-text-to-video"](None).pipe
    pipe.register_modules(transformer_2=fine_tuned(pipe.transformer))
    compute_delta(pipe.transformer, pipe.transformer_2, tmp_path / "delta.safetensors", dtype="float32")
    with pytest.raises(MergeError, match=r"several networks \(`transformer`, `transformer_2`\)"):
        merge_delta(pipe, tmp_path / "delta.safetensors")
    with pytest.raises(WeightSourceError, match="several networks"):
        open_weights(pipe)
    merge_delta(pipe.transformer, tmp_path / "delta.safetensors")
    for part, weight in pipe.transformer.named_parameters():
        torch.testing.assert_close(weight, pipe.transformer_2.get_parameter(part), rtol=0, atol=1e-7)
    for folder in ("transformer", "transformer_2"):
        getattr(pipe, folder).save_pretrained(tmp_path / "both" / folder)
    with pytest.raises(WeightSourceError, match=r"several networks \(`transformer/`, `transformer_2/`\)"):
        open_weights(tmp_path / "both")


def test_an_accelerator_of_a_unet_is_refused():
    pipe = FLOW["sd3-text-to-image"](FlowMatchEulerDiscreteScheduler()).pipe
    before = bits(pipe.transformer)
    with pytest.raises(
        ArtifactError, match=r"is for a `unet`.*StableDiffusion3Pipeline denoises with a `transformer`"
    ):
        load_perflow(pipe, "miniature")
    assert all(torch.equal(weight, before[part]) for part, weight in bits(pipe.transformer).items())


def test_what_is_no_network_is_said():
    with pytest.raises(MergeError, match="has no UNet"):
        merge_delta(SimpleNamespace(transformer=None), {})


def test_a_config_of_other_shapes_is_refused(tmp_path):
    sd3 = FLOW["sd3-text-to-image"](None).pipe.transformer
    compute_delta(sd3, fine_tuned(sd3), tmp_path / "delta.safetensors")
    sd3.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for change, words in (
        ({"num_layers": 1}, "one of SD3Transformer2DModel, which has others: transformer_blocks"),
        ({"_class_name": "CLIPTextModel"}, "it is one of CLIPTextModel"),
        ({"num_layers": "two"}, "cannot be built from it"),
    ):
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(WeightSourceError, match=words):
            merge_files(tmp_path / "base", tmp_path / "delta.safetensors", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
