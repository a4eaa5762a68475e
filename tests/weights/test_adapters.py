"""UNets that carry more than their own weights: adapters, compilation, other input channels, motion modules."""

import pytest
import torch
from diffusers import MotionAdapter, UNetMotionModel

from perflow_diffusers.weights import merge_delta, open_weights, unmerge_delta
from perflow_diffusers.weights.read import keys


@pytest.fixture
def plain_result(make_unet, delta, bits):
    """The weights of the plain UNet with the delta."""
    unet = make_unet()
    merge_delta(unet, delta)
    return bits(unet)


def test_canonical_names():
    plain = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert keys.canonical(plain) == plain
    assert keys.canonical(plain.replace("to_q.", "to_q.base_layer.")) == plain
    assert keys.canonical("_orig_mod." + plain) == plain
    assert keys.canonical(plain.replace("blocks.0.attn1", "blocks.0._orig_mod.attn1")) == plain
    assert keys.canonical(plain.replace("to_q.", "to_q.lora_A.default.")) is None
    assert keys.canonical(plain.replace("to_q.weight", "to_q.lora_magnitude_vector.x.weight")) is None
    assert not keys.is_extension(plain) and not keys.is_lora([plain])
    for extra in (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight",
        "encoder_hid_proj.image_projection_layers.0.norm.weight",
        "down_blocks.0.motion_modules.0.proj_in.weight",
        "mid_block.attentions.0.transformer_blocks.0.fuser.alpha_attn",
        "position_net.null_positive_feature",
        "class_embedding.linear_1.weight",
        "time_embedding.cond_proj.weight",
    ):
        assert keys.is_extension(extra)


def test_peft_adapter(make_unet, delta, plain_result, bits, same):
    peft = pytest.importorskip("peft")
    unet = make_unet()
    before = bits(unet)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    unet.add_adapter(config, "style")
    adapted = bits(unet)
    assert any("base_layer" in name for name in adapted) and any("lora_A" in name for name in adapted)
    handle = merge_delta(unet, delta)
    merged = {keys.canonical(name): value for name, value in bits(unet).items() if keys.canonical(name)}
    assert same(merged, plain_result)
    unmerge_delta(unet)
    assert same(bits(unet), adapted) and not handle.active
    merge_delta(unet, delta)
    unet.unload_lora()
    unmerge_delta(unet)
    assert same(bits(unet), before)


def test_adapter_loaded_after_the_merge(make_unet, delta, bits, same):
    peft = pytest.importorskip("peft")
    unet = make_unet(torch.float16)
    before = bits(unet)
    handle = merge_delta(unet, delta)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    handle.set_scale(0.5)
    handle.undo()
    unet.unload_lora()
    assert same(bits(unet), before)


def test_style_lora_fused_before(make_unet, delta, bits, same):
    peft = pytest.importorskip("peft")
    unet = make_unet(torch.float16)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), "style")
    unet.fuse_lora()
    fused = bits(unet)
    for _ in range(10):
        merge_delta(unet, delta).undo()
    assert same(bits(unet), fused)


def test_lora_fused_after_the_merge_is_not_overwritten(make_unet, delta, bits, same):
    peft = pytest.importorskip("peft")
    unet = make_unet()
    handle = merge_delta(unet, delta)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    unet.fuse_lora()
    fused = bits(unet)
    with pytest.raises(ValueError, match="unfuse_lora"):
        handle.undo()
    assert same(bits(unet), fused)


def test_compiled_unet_uses_new_weights_without_recompiling(make_unet, make_delta, bits, same):
    small = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = make_unet(**small, mid_block_type=None)
    delta, before, graphs = make_delta(unet), bits(unet), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(unet, backend=backend)
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 3, 16))
    with torch.no_grad():
        first = compiled(*inputs).sample
        count = len(graphs)
        handle = merge_delta(compiled, delta)
        second = compiled(*inputs).sample
        assert len(graphs) == count and not torch.allclose(first, second)
        assert torch.allclose(second, unet(*inputs).sample, atol=1e-6)
        handle.undo()
        assert torch.equal(compiled(*inputs).sample, first) and len(graphs) == count
    assert same(bits(unet), before)
    merge_delta(compiled, delta)
    unmerge_delta(unet)
    assert same(bits(unet), before)


@pytest.mark.parametrize("channels", [8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_more_input_channels(make_unet, delta, bits, same, channels, dtype):
    unet = make_unet(dtype, in_channels=channels)
    before = bits(unet)
    handle = merge_delta(unet, delta, scale=0.5)
    after, name = bits(unet), "conv_in.weight"
    wanted = before[name].double()
    wanted[:, :4] += 0.5 * delta[name].double()
    assert torch.equal(after[name], wanted.to(dtype)) or dtype == torch.float32
    assert torch.allclose(after[name].double(), wanted, atol=1e-3)
    assert torch.equal(after[name][:, 4:], before[name][:, 4:])
    assert handle.report.padded == (name,) and "first input channels" in str(handle.report)
    handle.undo()
    assert same(bits(unet), before)
    handle = merge_delta(unet, delta, conv_in="skip")
    after = bits(unet)
    assert torch.equal(after[name], before[name]) and not torch.equal(after["conv_in.bias"], before["conv_in.bias"])
    assert handle.report.skipped == (name,) and name in handle.plan.untouched
    handle.undo()
    assert same(bits(unet), before)


def test_fewer_input_channels_are_refused(make_unet, make_delta):
    delta = make_delta(make_unet(in_channels=9))
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        merge_delta(make_unet(), delta)


def test_motion_modules_stay(make_unet, delta, plain_result, bits, same):
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )
    motion = UNetMotionModel.from_unet2d(make_unet(), adapter)
    before = bits(motion)
    handle = merge_delta(motion, delta)
    after = bits(motion)
    assert same({name: after[name] for name in plain_result}, plain_result)
    assert handle.plan.untouched and all("motion_modules" in name for name in handle.plan.untouched)
    assert same({n: after[n] for n in handle.plan.untouched}, {n: before[n] for n in handle.plan.untouched})
    handle.undo()
    assert same(bits(motion), before)


def test_ip_adapter_processors_stay(make_unet, delta, bits, same):
    unet = make_unet()
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.processor = torch.nn.Module()
    attention.processor.to_k_ip = torch.nn.ModuleList([torch.nn.Linear(16, 16)])
    before = bits(unet)
    handle = merge_delta(unet, delta)
    assert len(handle.plan.untouched) == 2 and all("to_k_ip" in name for name in handle.plan.untouched)
    handle.undo()
    assert same(bits(unet), before)


def test_sources_that_are_models_lose_their_wrapping(make_unet, bits, same):
    peft = pytest.importorskip("peft")
    unet = make_unet()
    before = bits(unet)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "style")
    assert same(dict(open_weights(unet)), before)
