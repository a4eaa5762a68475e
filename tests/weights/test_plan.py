"""Deltas and models that do not fit: the error says what and why, and no weight changes."""

from types import SimpleNamespace

import pytest
import torch

from perflow_diffusers.weights import DeltaError, MergeError, WeightSourceError, compute_delta, merge_delta, plan_merge
from perflow_diffusers.weights.read.source import open_weights


@pytest.fixture
def refused(unet, bits, same):
    """Merging into `unet` raises a ValueError that matches, and nothing changed."""

    def check(source, match, model=None, error=MergeError, **options):
        before = bits(unet)
        with pytest.raises(error, match=match) as raised:
            merge_delta(unet if model is None else model, source, **options)
        assert isinstance(raised.value, ValueError)
        assert same(bits(unet), before)
        return str(raised.value)

    return check


def test_missing_keys(refused, delta):
    for name in [name for name in delta if name.startswith(("down_blocks.0.", "mid_block"))]:
        del delta[name]
    message = refused(delta, "Missing in the delta")
    assert "down_blocks.0 (" in message and "mid_block (" in message and "nothing was changed" in message


def test_extra_keys(refused, delta):
    delta["add_embedding.linear_1.weight"] = torch.zeros(2, 2)
    assert "add_embedding.linear_1.weight" in refused(delta, r"Not in the model \(1\)")


def test_misshapen_keys(refused, delta):
    name = "mid_block.attentions.0.proj_in.weight"
    delta[name] = delta[name][:, :, 0, 0]
    assert "(16, 16) for (16, 16, 1, 1)" in refused(delta, r"Misshapen \(1\)")


def test_delta_of_another_family(refused, make_unet, make_delta):
    other = make_delta(make_unet(cross_attention_dim=2048))
    message = refused(other, "The delta is for SDXL, the model is a UNet with text embeddings of width 16")
    assert "Misshapen (" in message


def test_weights_of_another_model(refused):
    refused({"encoder.conv.weight": torch.zeros(3)}, "Not one name is common")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float8_e5m2])
def test_not_finite(refused, delta, value, dtype):
    name = "up_blocks.0.resnets.1.conv1.weight"
    delta[name] = delta[name].float()
    delta[name].view(-1)[-1] = value
    delta[name] = delta[name].to(dtype)
    assert name in refused(delta, "NaN or Inf in 1 tensors")


def test_float8_deltas_merge(unet, delta, bits):
    before = bits(unet)
    coarse = {name: value.to(torch.float8_e4m3fn) for name, value in delta.items()}
    merge_delta(unet, coarse, 0.5)
    after = bits(unet)
    assert all(torch.equal(after[name], before[name] + coarse[name].float() * 0.5) for name in before)


def test_empty_delta_and_wrong_dtype(refused, delta):
    refused({}, "empty")
    delta["conv_out.bias"] = torch.zeros(4, dtype=torch.int8)
    refused(delta, r"conv_out.bias \(torch.int8\)")


def test_duplicate_keys_after_mapping(refused, delta):
    delta["mid_block.attentions.0.proj_in.base_layer.bias"] = delta["mid_block.attentions.0.proj_in.bias"]
    refused(delta, "more than one tensor for the same weight")


def test_original_format(refused):
    refused({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, "original format")


def test_delta_names_may_come_wrapped(make_unet, make_delta, bits, same):
    unet = make_unet()
    delta = make_delta(unet)
    merge_delta(unet, delta)
    wanted = bits(unet)
    for prefix in ("unet.", "_orig_mod.", "module."):
        twin = make_unet()
        merge_delta(twin, {prefix + name: value for name, value in delta.items()})
        assert same(bits(twin), wanted)


def test_pipelines_without_unet(refused, delta):
    message = refused(delta, "has no UNet", SimpleNamespace(prior=torch.nn.Linear(2, 2)))
    assert "`prior`" in message
    refused(delta, "Not one name is common", SimpleNamespace(transformer=torch.nn.Linear(2, 2)))
    refused(delta, "has no UNet", SimpleNamespace(unet=None))
    refused(delta, "has no UNet.*comes first", "runwayml/stable-diffusion-v1-5")


def test_unreadable_sources(refused, tmp_path):
    refused(tmp_path / "no.safetensors", "No file, folder or known weights", error=WeightSourceError)
    refused(42, "Cannot read weights from 42", error=WeightSourceError)


def test_meta_fp8_quantised_and_tied_models(refused, make_unet, delta):
    refused(delta, "offloaded.*remove_all_hooks", make_unet().to("meta"))
    refused(delta, "fp8", make_unet().to(torch.float8_e4m3fn))
    quantised = make_unet()
    linear = quantised.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    linear.weight = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    refused(delta, "1 weights of the model are quantised", quantised)

    class Packed(torch.Tensor):
        pass

    linear.weight = torch.nn.Parameter(torch.zeros(16, 16).as_subclass(Packed), requires_grad=False)
    refused(delta, "quantised", quantised)
    tied = make_unet()
    attention = tied.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q.weight = attention.to_k.weight
    refused(delta, "one tensor, which would get the delta twice", tied)


def test_sequential_offload(refused, make_unet, delta):
    accelerate = pytest.importorskip("accelerate")
    offloaded = make_unet()
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    refused(delta, "offloaded", offloaded)


def test_layerwise_casting_and_group_offloading(refused, make_unet, delta):
    cast = make_unet()
    cast.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused(delta, "fp8", cast)
    grouped = make_unet()
    grouped.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    refused(delta, "group offloading", grouped)


def test_fused_projections(refused, make_unet, delta, bits):
    fused = make_unet()
    fused.fuse_qkv_projections()
    refused(delta, "unfuse_qkv_projections", fused)
    fused.unfuse_qkv_projections()
    plan = plan_merge(fused, delta)
    assert len(plan.edits) == len(delta) and all(".to_qkv." in n or ".to_kv." in n for n in plan.untouched)


def test_undo_sees_projections_that_were_fused_later(make_unet, delta, bits, same):
    unet = make_unet()
    before = bits(unet)
    handle = merge_delta(unet, delta)
    unet.fuse_qkv_projections()
    with pytest.raises(MergeError, match="unfuse_qkv_projections"):
        handle.undo()
    unet.unfuse_qkv_projections()
    handle.undo()
    after = bits(unet)
    assert same({name: after[name] for name in before}, before)


def test_dropped_identical_tensors_are_not_missing(make_unet, make_delta, bits, same):
    base, tuned = make_unet(), make_unet()
    tuned.mid_block.resnets[0].conv1.weight.add_(0.125)
    delta = compute_delta(base, tuned, drop_identical=True)
    assert list(delta) == ["mid_block.resnets.0.conv1.weight"]
    handle = merge_delta(base, delta)
    assert len(handle.plan.untouched) == len(bits(base)) - 1
    with pytest.raises(DeltaError, match="identical"):
        compute_delta(make_unet(), make_unet(), drop_identical=True)
    with pytest.raises(MergeError, match="Missing"):
        merge_delta(base, open_weights(dict(delta)))


def test_a_complete_model_in_place_of_a_delta(refused, make_unet, unet, tmp_path):
    """The commonest slip: the tuned checkpoint itself. Its norms give it away; zero or tiny differences do not."""
    tuned = make_unet()
    tuned.conv_in.weight += 0.01
    tuned.save_pretrained(tmp_path / "unet")
    for source in (tmp_path, tuned.state_dict()):
        assert "compute_delta(base, tuned)" in refused(source, "complete weights, not a delta")
    plan_merge(unet, {name: weight * 0 for name, weight in unet.state_dict().items()})


def test_state_that_is_no_tensor_is_that_of_a_quantiser(refused, make_unet, delta):
    """As torch's dynamic quantisation and TransformerEngine leave it in the state dict."""

    class Packing(torch.nn.Linear):
        def get_extra_state(self):
            return ("packed", torch.qint8)

    unet = make_unet()
    unet.time_embedding.linear_1 = Packing(1, 1)
    refused(delta, "packed by a quantiser", unet)
