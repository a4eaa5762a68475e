"""Layouts of LoRA files: there and back restores every tensor, and other tools read what is written."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_files import (
    layers_of,
    products,
    random_factors,
    write_diffusers,
    write_kohya,
    write_old_diffusers,
    write_peft,
)
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import WeightSourceError, WeightWriteError, open_weights
from perflow_diffusers.weights.make.convert import convert_lora
from perflow_diffusers.weights.read import lora_names
from perflow_diffusers.weights.read.lora import as_delta, lora_layers

SDXL = {
    "block_out_channels": (4, 8, 8),
    "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 2),
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}
SD15 = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 2, "attention_head_dim": 4, "cross_attention_dim": 768}


@pytest.fixture(params=["sd15", "sdxl"])
def family(request):
    """Every layer of a UNet with the layers of SD 1.5 or SDXL, narrow, and whether it is the latter."""
    unet = UNet2DConditionModel(**(SDXL if request.param == "sdxl" else SD15))
    return random_factors(unet, torch.float16), request.param == "sdxl"


def equal(first, second):
    first, second = load_file(first), load_file(second)
    return first.keys() == second.keys() and all(
        first[name].dtype == value.dtype and first[name].shape == value.shape and torch.equal(first[name], value)
        for name, value in second.items()
    )


def original(module):
    return lora_names.to_original(module).replace(".", "_")


def with_text(path, prefixes):
    """The file with layers of text encoders added."""
    tensors, header = load_file(path), dict(open_weights(path).metadata)
    for number, prefix in enumerate(prefixes):
        for leaf in ("self_attn_q_proj", "self_attn_out_proj", "mlp_fc1"):
            stem = f"{prefix}text_model_encoder_layers_{number}_{leaf}"
            tensors |= {f"{stem}.lora_down.weight": torch.rand(2, 4).half(), f"{stem}.alpha": torch.tensor(0.5).half()}
            tensors[f"{stem}.lora_up.weight"] = torch.rand(4, 2).half()
    save_file(tensors, path, header)


@pytest.mark.parametrize("alpha_dtype", [torch.float16, torch.float32])
def test_kohya_there_and_back(family, tmp_path, alpha_dtype):
    factors, sdxl = family
    names = original if sdxl else lambda module: module.replace(".", "_")
    path = write_kohya(tmp_path / "k.safetensors", factors, alpha_dtype, names, ss_seed="7", perflow_format="lora-1")
    with_text(path, ("lora_te1_", "lora_te2_") if sdxl else ("lora_te_",))
    there = convert_lora(path, tmp_path / "d.safetensors", "diffusers")
    assert all(".lora_A." in name or ".lora_B." in name for name in load_file(there))
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    assert text in load_file(there) and "unet.time_embedding.linear_1.lora_B.weight" in load_file(there)
    back = convert_lora(there, tmp_path / "b.safetensors", "kohya")
    assert equal(path, back)
    header = open_weights(back).metadata
    assert header["ss_seed"] == "7" and header["perflow_format"] == "lora-1" and "perflow_kohya" not in header
    first, second = (lora_layers(open_weights(each)) for each in (path, there))
    assert [(a.module, a.rank, a.alpha) for a in first] == [(b.module, b.rank, b.alpha) for b in second]


def test_diffusers_there_and_back(family, tmp_path):
    factors, sdxl = family
    factors["conv_in"] = (*factors["conv_in"][:2], 0.1)  # no fp16 or fp32 number
    path = write_diffusers(tmp_path / "d.safetensors", factors, recommended_steps="[4]")
    there = convert_lora(path, tmp_path / "k.safetensors", "kohya")
    found, header = load_file(there), open_weights(there).metadata
    spelled = original if sdxl else lambda module: module.replace(".", "_")
    assert set(found) == {
        f"lora_unet_{spelled(module)}.{part}"
        for module in factors
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    alphas = {module: found[f"lora_unet_{spelled(module)}.alpha"] for module in factors}
    assert all(alphas[module].item() == alpha for module, (_, _, alpha) in factors.items())
    assert alphas["conv_in"].dtype == torch.float64 and alphas["conv_out"].dtype == torch.float16
    assert header["ss_network_module"] == "networks.lora" and header["ss_network_dim"] in "234"
    assert header["recommended_steps"] == "[4]" and float(header["ss_network_alpha"]) in (0.1, 1, 2, 2.5, 3, 4, 8)
    back = convert_lora(there, tmp_path / "b.safetensors", "diffusers")
    assert equal(path, back)
    old, new = (open_weights(each).metadata["lora_adapter_metadata"] for each in (path, back))
    assert json.loads(old) == json.loads(new)


def test_diffusers_loads_kohya_files_that_were_in_its_own_layout(make_unet, unet, tiny_pipeline, tmp_path):
    """It refuses a file that has both `.alpha` and its own config in the header."""
    factors = {module: (down, up, 4.0) for module, (down, up, _) in random_factors(unet).items()}
    kohya = convert_lora(write_diffusers(tmp_path / "d.safetensors", factors), tmp_path / "k.safetensors", "kohya")
    tiny_pipeline.unet = make_unet()
    tiny_pipeline.load_lora_weights(tmp_path, weight_name=kohya.name)
    loaded = tiny_pipeline.unet.state_dict()
    for module, (down, up, _) in factors.items():
        assert torch.equal(loaded[f"{module}.lora_A.default_0.weight"], down)
        assert torch.equal(loaded[f"{module}.lora_B.default_0.weight"], up)


def test_diffusers_loads_what_is_converted(make_unet, unet, tiny_pipeline, tmp_path):
    """kohya -> diffusers, every alpha and rank different: the adapter computes what the factors say."""
    factors = random_factors(unet)
    kohya = write_kohya(tmp_path / "k.safetensors", factors)
    path = convert_lora(kohya, tmp_path / "d.safetensors", "diffusers")
    tiny_pipeline.unet = make_unet()
    tiny_pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(1, 4, 8, 8, generator=generator), 500, torch.randn(1, 3, 16, generator=generator)
    with torch.no_grad():
        adapted = tiny_pipeline.unet(*inputs).sample
        for name, change in products(factors).items():
            unet.state_dict()[name].add_(change)
        assert torch.allclose(adapted, unet(*inputs).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sdxl", [False, True])
def test_diffusers_reads_every_layer_of_our_kohya_files(sdxl, tmp_path):
    """Its own converter finds every factor, conv_in, conv_out and the time embedding included."""
    from diffusers import StableDiffusionXLPipeline

    unet = UNet2DConditionModel(**(SDXL if sdxl else SD15))
    factors = {module: (down, up, 4.0) for module, (down, up, _) in random_factors(unet).items()}
    path = convert_lora(write_diffusers(tmp_path / "d.safetensors", factors), tmp_path / "k.safetensors", "kohya")
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(path), unet_config=unet.config)[:2]
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas)
    loaded = unet.state_dict()
    for module, (down, up, _) in factors.items():
        assert torch.equal(loaded[f"{module}.lora_A.default_0.weight"], down)
        assert torch.equal(loaded[f"{module}.lora_B.default_0.weight"], up)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_other_layouts_are_read(unet, tmp_path, layout):
    factors = random_factors(unet)
    peft = write_peft(tmp_path / "peft", factors)
    found = as_delta(open_weights(convert_lora(peft, tmp_path / "p.safetensors", layout)))
    wanted = products(factors)
    assert all(torch.allclose(found[name].double(), wanted[name], atol=1e-5) for name in wanted)
    old = write_old_diffusers(tmp_path / "old.safetensors", factors)
    found = as_delta(open_weights(convert_lora(old, tmp_path / "o.safetensors", layout)))
    wanted = products({module: (down, up, float(down.shape[0])) for module, (down, up, _) in factors.items()})
    assert all(torch.allclose(found[name].double(), wanted[name], atol=1e-5) for name in wanted)


def test_layers_without_alpha_and_alphas_of_odd_form_come_back(tmp_path):
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    tensors = {}
    for number, leaf in enumerate(("attn1_to_q", "attn1_to_k", "attn2_to_v", "ff_net_0_proj")):
        tensors |= {
            f"{stem}{leaf}.lora_down.weight": torch.rand(2, 4),
            f"{stem}{leaf}.lora_up.weight": torch.rand(4, 2),
        }
        if number:
            tensors[f"{stem}{leaf}.alpha"] = torch.full((1,) if number == 1 else (), 1.5).to(
                torch.bfloat16 if number == 2 else torch.float64
            )
    save_file(tensors, tmp_path / "k.safetensors")
    convert_lora(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers")
    convert_lora(tmp_path / "d.safetensors", tmp_path / "b.safetensors", "kohya")
    assert equal(tmp_path / "k.safetensors", tmp_path / "b.safetensors")


def test_text_encoders_of_newer_transformers(tmp_path):
    """Newer CLIP models say `encoder.layers`, kohya's tools expect `text_model_encoder_layers`."""
    stem = "text_encoder.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.rand(2, 4), f"{stem}.lora_B.weight": torch.rand(4, 2)}
    path = convert_lora(tensors, tmp_path / "k.safetensors", "kohya")
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in load_file(path)


def test_a_residual_travels_along(unet, tmp_path):
    (tmp_path / "new").mkdir()
    save_file(
        {"conv_in.bias": torch.ones(8)}, tmp_path / "l.residual.safetensors", {"perflow_format": "delta-residual-1"}
    )
    path = write_diffusers(tmp_path / "l.safetensors", random_factors(unet), perflow_residual="l.residual.safetensors")
    out = convert_lora(path, tmp_path / "new" / "comfy.safetensors", "kohya")
    assert equal(tmp_path / "l.residual.safetensors", tmp_path / "new" / "comfy.residual.safetensors")
    assert open_weights(tmp_path / "new" / "comfy.residual.safetensors").kind == "delta"
    assert torch.equal(as_delta(open_weights(out))["conv_in.bias"], torch.ones(8))


def test_what_cannot_be_converted(unet, delta_file, tmp_path):
    out = tmp_path / "x.safetensors"
    good = load_file(write_diffusers(tmp_path / "d.safetensors", random_factors(unet)))
    with pytest.raises(WeightSourceError, match="layout='webui' is unknown"):
        convert_lora(good, out, "webui")
    with pytest.raises(WeightSourceError, match="is not a LoRA"):
        convert_lora(delta_file, out, "kohya")
    with pytest.raises(WeightSourceError, match=r"called like nothing in a LoRA.*unet\.odd\.thing"):
        convert_lora({**good, "unet.odd.thing": torch.ones(1)}, out, "kohya")
    named = {"unet.odd_head.lora_A.weight": torch.ones(2, 3), "unet.odd_head.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(WeightSourceError, match=r"unet\.odd_head of .* has no name in the kohya layout"):
        convert_lora({**good, **named}, out, "kohya")
    with pytest.raises(WeightSourceError, match="LoHa"):
        convert_lora({**good, "lora_unet_conv_in.hada_w1_a": torch.ones(1)}, out, "kohya")
    tucker = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 1, 1),
        "lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    }
    with pytest.raises(WeightSourceError, match=r"1 layers .* have a middle factor"):
        convert_lora(tucker, out, "diffusers")
    assert not out.exists()
    assert load_file(convert_lora(tucker, out, "kohya")).keys() == tucker.keys()


def test_targets_that_cannot_be_written(unet, tmp_path):
    path = write_diffusers(tmp_path / "d.safetensors", random_factors(unet))
    old = path.read_bytes()
    with pytest.raises(WeightWriteError, match="overwrite=True"):
        convert_lora(path, path, "kohya")
    with pytest.raises(WeightWriteError, match="There is no folder"):
        convert_lora(path, tmp_path / "no" / "x.safetensors", "kohya")
    assert path.read_bytes() == old
    convert_lora(path, path, "kohya", overwrite=True)
    assert len(lora_layers(open_weights(path))) == len(layers_of(unet))
