"""LoRAs as deltas: every layout gives what diffusers computes with the adapter active, and comes off to the bit."""

import json
import warnings

import pytest
import torch
from diffusers import UNet2DConditionModel
from ldm_names import CONFIGS
from lora_files import (
    WRITERS,
    layers_of,
    products,
    random_factors,
    write_diffusers,
    write_kohya,
    write_old_diffusers,
)
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import (
    WeightSourceError,
    compute_delta,
    merge_delta,
    open_weights,
    set_delta_scale,
    unmerge_delta,
)
from perflow_diffusers.weights.make.convert import convert_lora
from perflow_diffusers.weights.read import lora_names
from perflow_diffusers.weights.read.lora import as_delta, lora_layers


def output(unet):
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([700, 20]), text).sample.double()


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_names_of_all_modules_come_back_from_underscores():
    for config, count in ((CONFIGS["SD 1.5"], 282), (CONFIGS["SDXL"], 794)):
        with torch.device("meta"):
            modules = layers_of(UNet2DConditionModel(**config))
        assert len(modules) == count
        originals = {module: lora_names.to_original(module) for module in modules}
        assert len(set(originals.values())) == count
        for module, original in originals.items():
            assert lora_names.dotted(module.replace(".", "_")) == module
            assert lora_names.dotted(original.replace(".", "_")) == original
            assert lora_names.from_original(original) == module
    assert lora_names.from_original("output_blocks.2.1.conv") == "up_blocks.0.upsamplers.0.conv"  # as SD 1.x has it
    assert lora_names.dotted("down_blocks_0_teapot") is None


@pytest.mark.parametrize("layout", list(WRITERS))
def test_numbers_are_those_of_the_factors(factors, tmp_path, layout):
    path = WRITERS[layout](tmp_path / f"{layout}.safetensors", factors)
    delta, wanted = as_delta(open_weights(path)), products(factors)
    assert set(delta) == set(wanted) and delta.kind == "lora" and delta.partial
    for name, value in wanted.items():
        assert delta.shapes[name] == tuple(value.shape) and delta[name].dtype == torch.float32
        assert torch.allclose(delta[name].double(), value, rtol=1e-5, atol=1e-6)
        low, high = delta.extremes(name)
        assert low <= value.min() and value.max() <= high
    assert as_delta(delta) is delta


@pytest.mark.parametrize("layout", list(WRITERS))
def test_merging_equals_the_active_adapter(make_unet, tiny_pipeline, factors, tmp_path, layout):
    """PEFT's own folder loads through PEFT, the two others as users load them.

    One alpha for all in kohya's layout: diffusers 0.42 loses the alphas of attention layers where they differ.
    """
    if layout == "kohya":
        factors = {module: (down, up, 3.0) for module, (down, up, _) in factors.items()}
    lora_file = WRITERS[layout](tmp_path / ("style" if layout == "peft" else "style.safetensors"), factors)
    merged, adapted = make_unet(), make_unet()
    before = output(merged)
    handle = merge_delta(merged, lora_file)
    assert handle.report.changed == len(factors) and len(handle.report.untouched) == 208 - len(factors)
    if lora_file.is_dir():
        peft = pytest.importorskip("peft")
        reference = peft.PeftModel.from_pretrained(adapted, lora_file)
    else:
        tiny_pipeline.unet = reference = adapted
        tiny_pipeline.load_lora_weights(lora_file.parent, weight_name=lora_file.name)
        assert sum(".lora_A." in name for name in reference.state_dict()) == len(factors)
    wanted = output(reference)
    assert relative(output(merged), wanted) < 1e-5 < 0.01 < relative(before, wanted)
    handle.undo()
    assert torch.equal(output(merged), before)


def test_old_diffusers_names(unet, make_unet, tiny_pipeline, factors, tmp_path):
    path = write_old_diffusers(tmp_path / "old.safetensors", factors)
    layers = {layer.module: layer for layer in lora_layers(open_weights(path))}
    assert set(layers) == set(factors) and all(layer.scale == 1 for layer in layers.values())
    tiny_pipeline.unet = make_unet()
    tiny_pipeline.load_lora_weights(path.parent, weight_name=path.name)
    merge_delta(unet, path)
    assert relative(output(unet), output(tiny_pipeline.unet)) < 1e-5


def test_live_peft_adapter_as_a_state_dict(unet, make_unet):
    peft = pytest.importorskip("peft")
    adapted = make_unet()
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "conv1"], init_lora_weights=False)
    adapted.add_adapter(config, "style")
    factors = {name: value for name, value in adapted.state_dict().items() if ".lora_" in name}
    assert all(".style.weight" in name for name in factors)
    merge_delta(unet, factors)
    assert relative(output(unet), output(adapted)) < 1e-5


def test_patterns_match_as_in_peft(factors, tmp_path):
    """The first pattern that matches the end of the name as a regular expression wins; rslora divides by the root."""
    path = write_diffusers(tmp_path / "l.safetensors", factors)
    patterns = {"to_q": 6, r"attn2\.to_.": 12, "^conv_in": 3, "conv": 99}
    for rslora in (False, True):
        config = {"unet.r": 4, "unet.lora_alpha": 5, "unet.alpha_pattern": patterns, "unet.use_rslora": rslora}
        save_file(load_file(path), tmp_path / "p.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        for layer in lora_layers(open_weights(tmp_path / "p.safetensors")):
            last = layer.module.split(".")
            wanted = 6 if last[-1] == "to_q" else 12 if last[-2:-1] == ["attn2"] else 5
            wanted = {"conv_in": 3, "conv": 99}.get(last[-1] if last[-1] == "conv" else layer.module, wanted)
            root = layer.rank**0.5 if rslora else layer.rank
            assert layer.scale == pytest.approx(wanted / root, rel=1e-12)


def test_original_spelling_of_sdxl(tmp_path):
    names = {
        "input_blocks_4_1_transformer_blocks_1_ff_net_2": "down_blocks.1.attentions.0.transformer_blocks.1.ff.net.2",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
        "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
        "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "output_blocks_0_0_emb_layers_1": "up_blocks.0.resnets.0.time_emb_proj",
        "input_blocks_0_0": "conv_in",
        "out_2": "conv_out",
        "time_embed_2": "time_embedding.linear_2",
        "label_emb_0_0": "add_embedding.linear_1",
    }
    tensors = {}
    for name in names:
        stem = f"lora_unet_{name}"
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 3), f"{stem}.lora_up.weight": torch.ones(5, 2)}
    layers = lora_layers(open_weights(tensors))
    assert {layer.module for layer in layers} == set(names.values()) and all(layer.original for layer in layers)
    extracted = "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight"  # by ComfyUI
    plain = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert lora_names.parse(extracted) == lora_names.LoraName("unet", plain, "up", original=True)


def test_modules_of_the_model_at_hand_come_first(unet):
    """A module whose name no grammar knows is found by looking among the model's."""
    unet.extra_head_1 = torch.nn.Linear(3, 5, bias=False)
    factors = {"lora_unet_extra_head_1.lora_down.weight": torch.ones(2, 3)}
    factors |= {"lora_unet_extra_head_1.lora_up.weight": torch.ones(5, 2)}
    before = unet.extra_head_1.weight.detach().clone()
    merge_delta(unet, factors)
    assert torch.equal(unet.extra_head_1.weight, before + 2)
    with pytest.raises(WeightSourceError, match="called like nothing in a LoRA"):
        as_delta(open_weights(factors))


def test_tucker_factors(unet):
    """LoCon: up (out, r, 1, 1) after mid (r, r, 3, 3) after down (r, in, 1, 1) are three convolutions in a row."""
    torch.manual_seed(0)
    name = "mid_block.resnets.0.conv1"
    stem = f"lora_unet_{name.replace('.', '_')}"
    down, mid, up = torch.randn(3, 16, 1, 1), torch.randn(3, 3, 3, 3), torch.randn(16, 3, 1, 1)
    source = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": mid, f"{stem}.lora_up.weight": up}
    source[f"{stem}.alpha"] = torch.tensor(1.5)
    delta, image = as_delta(open_weights(source)), torch.randn(1, 16, 8, 8)
    conv = torch.nn.functional.conv2d
    wanted = conv(conv(conv(image, down), mid, padding=1), up) * 0.5
    assert torch.allclose(conv(image, delta[f"{name}.weight"], padding=1), wanted, atol=1e-4)
    low, high = delta.extremes(f"{name}.weight")
    assert low <= delta[f"{name}.weight"].min() and delta[f"{name}.weight"].max() <= high
    merge_delta(unet, source)


def test_linear_factors_of_a_1x1_convolution(unet):
    name = "mid_block.attentions.0.proj_in"
    before = unet.mid_block.attentions[0].proj_in.weight.detach().clone()
    assert before.shape == (16, 16, 1, 1)
    factors = {f"unet.{name}.lora_A.weight": torch.ones(2, 16), f"unet.{name}.lora_B.weight": torch.ones(16, 2)}
    merge_delta(unet, factors)
    assert torch.equal(unet.mid_block.attentions[0].proj_in.weight, before + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_rounding_and_every_bit_back(make_unet, make_delta, bits, same, lora_file, factors, dtype):
    unet = make_unet(dtype)
    before, wanted = bits(unet), products(factors)
    delta = make_delta(unet)
    first = merge_delta(unet, delta, 0.5)
    second = merge_delta(unet, lora_file, scale=0.25)
    wrong = total = 0
    for name, weight in bits(unet).items():
        exact = before[name].double() + 0.5 * delta[name].double() + 0.25 * wanted.get(name, 0)
        if dtype == torch.float32:
            assert torch.allclose(weight.double(), exact, rtol=1e-6, atol=1e-6)
        wrong, total = wrong + (weight != exact.to(dtype)).sum().item(), total + weight.numel()
    assert dtype == torch.float32 or wrong < 0.003 * total  # fp32 sums that fall on the other side of a tie
    for scale in (0, 2, 0.25):
        set_delta_scale(unet, scale)
    second.undo()
    first.undo()
    assert same(bits(unet), before)
    with merge_delta(unet, lora_file, backup="disk"):
        assert not same(bits(unet), before)
    assert same(bits(unet), before)


def test_products_are_computed_once_a_merge(unet, factors, monkeypatch, tmp_path):
    from perflow_diffusers.weights.read import lora

    real, calls = lora._product, []
    monkeypatch.setattr(lora, "_product", lambda *given: calls.append(given[1].module) or real(*given))
    merge_delta(unet, write_kohya(tmp_path / "k.safetensors", factors))
    assert sorted(calls) == sorted(factors)


def test_products_in_fp32_under_autocast(factors, tmp_path):
    delta = as_delta(open_weights(write_diffusers(tmp_path / "l.safetensors", factors)))
    plain = delta["conv_in.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta["conv_in.weight"], plain)


def test_two_merges_of_one_lora_are_told_in_any_layout(make_unet, factors, tmp_path):
    unet = make_unet()
    merge_delta(unet, write_kohya(tmp_path / "k.safetensors", factors))
    with pytest.warns(UserWarning, match="merged into this UNet already"):
        merge_delta(unet, write_diffusers(tmp_path / "d.safetensors", factors))
    unmerge_delta(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_delta(unet, write_diffusers(tmp_path / "e.safetensors", random_factors(unet, seed=9)))


@pytest.mark.parametrize("channels", [8, 9])
def test_more_input_channels(make_unet, factors, lora_file, channels):
    unet = make_unet(in_channels=channels)
    before = unet.conv_in.weight.detach().clone()
    handle = merge_delta(unet, lora_file)
    wanted = before.double()
    wanted[:, :4] += products(factors)["conv_in.weight"]
    assert torch.allclose(unet.conv_in.weight.double(), wanted, atol=1e-6)
    assert torch.equal(unet.conv_in.weight[:, 4:], before[:, 4:]) and handle.report.padded == ("conv_in.weight",)


def test_peft_injected_and_compiled_models(make_unet, lora_file, bits, same):
    peft = pytest.importorskip("peft")
    unet, plain = make_unet(), make_unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), "style")
    before = bits(unet)
    handle = merge_delta(torch.compile(unet, backend="eager"), lora_file)
    merge_delta(plain, lora_file)
    after = {name.replace(".base_layer", ""): value for name, value in bits(unet).items() if "lora_" not in name}
    assert same(after, bits(plain))
    handle.undo()
    assert same(bits(unet), before)


def test_kind_goes_by_the_names_first(factors, delta_file, tmp_path):
    path = write_diffusers(tmp_path / "l.safetensors", factors, perflow_format="delta-1")
    assert open_weights(path).kind == "lora"
    assert open_weights({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}).kind == "lora"
    assert open_weights(delta_file).kind == "delta" and as_delta(open_weights(delta_file)).kind == "delta"


def test_a_lora_is_no_model(unet, factors, tmp_path):
    with pytest.raises(ValueError, match="is a LoRA, not complete weights"):
        compute_delta(unet, write_kohya(tmp_path / "k.safetensors", factors))


def test_alpha_of_a_lone_unets_adapter(make_unet, tmp_path):
    """`unet.save_lora_adapter` writes names and config without the component."""
    from peft import LoraConfig

    unet, inputs = make_unet(), (torch.randn(1, 4, 8, 8), 500, torch.randn(1, 3, 16))
    unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=7,
            target_modules=["to_q", "conv_in"],
            alpha_pattern={"conv_in": 3},
            init_lora_weights=False,
        )
    )
    unet.save_lora_adapter(tmp_path / "lora")
    path = convert_lora(tmp_path / "lora", tmp_path / "with_prefix.safetensors", "diffusers")
    for source in (tmp_path / "lora", path):
        merged = make_unet()
        merge_delta(merged, source)
        with torch.no_grad():
            assert torch.allclose(merged(*inputs).sample, unet(*inputs).sample, rtol=1e-4, atol=1e-5)
    loaded = make_unet()
    config = json.loads(open_weights(path).metadata["lora_adapter_metadata"])
    loaded.load_lora_adapter(load_file(path), prefix="unet", metadata=config)
    with torch.no_grad():
        assert torch.allclose(loaded(*inputs).sample, unet(*inputs).sample, rtol=1e-4, atol=1e-5)
