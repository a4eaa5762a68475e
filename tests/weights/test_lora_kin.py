"""LoHa, LoKr, DoRA, whole differences and biases in a merge: PEFT's and LyCORIS's own layers are the judges."""

import pytest
import torch
from lora_files import original_names
from safetensors.torch import load_file, save_file
from test_adapter_config import assert_merges_as_peft, peft_model, saved, trained, weights_of
from test_lora import output, relative

from perflow_diffusers.weights import (
    MergeError,
    WeightSourceError,
    convert_lora,
    extract_lora,
    merge_delta,
)
from perflow_diffusers.weights.info import describe_weights

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
PEFT = {
    "loha": lambda **more: peft.LoHaConfig(r=3, alpha=5, init_weights=False, target_modules=TARGETS, **more),
    "lokr": lambda **more: peft.LoKrConfig(r=2, alpha=5, init_weights=False, target_modules=TARGETS, **more),
    "lora": lambda **more: peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=TARGETS, **more),
}
VARIANTS = [
    ("loha", {}),
    ("loha", {"use_effective_conv2d": True, "alpha_pattern": {"to_q": 2}, "rank_pattern": {"conv1": 2}}),
    ("lokr", {}),
    ("lokr", {"r": 64, "alpha": 5, "alpha_pattern": {"to_q": 2}, "rank_pattern": {"conv1": 40}}),  # whole factors
    ("lokr", {"use_effective_conv2d": True, "decompose_both": True, "r": 1}),
    ("lokr", {"decompose_factor": 2, "decompose_both": True, "r": 1}),
    ("lora", {"use_dora": True}),
    ("lora", {"use_dora": True, "use_rslora": True, "alpha_pattern": {"conv1": 2}}),
    ("lora", {"lora_bias": True, "target_modules": ["to_out.0", "proj_in", "conv1", "time_emb_proj"]}),
]


def peft_adapter(unet, kind, options):
    options = dict(options)
    config = PEFT[kind]()
    for name, value in options.items():
        setattr(config, name, set(value) if name == "target_modules" else value)
    return trained(peft_model(unet, config))


@pytest.mark.parametrize("kind, options", VARIANTS)
def test_merged_as_peft_merges(unet, bits, same, tmp_path, kind, options):
    model = peft_adapter(unet, kind, options)
    saved(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    merged = model.merge_and_unload()
    assert_merges_as_peft(unet, tmp_path / "adapter", merged)
    touched = {name for name, value in weights_of(merged).items() if not torch.equal(value, weights_of(unet)[name])}
    assert len(touched) >= 8 and len(stored) >= 2 * 8
    before = bits(unet)
    handle = merge_delta(unet, tmp_path / "adapter", 0.7)
    handle.set_scale(-1.5)
    handle.undo()
    assert same(bits(unet), before)


LYCORIS = {
    "loha": ("loha", "LohaModule", {}),
    "loha, Tucker": ("loha", "LohaModule", {"use_tucker": True}),
    "loha, DoRA": ("loha", "LohaModule", {"weight_decompose": True}),
    "lokr": ("lokr", "LokrModule", {}),
    "lokr, Tucker": ("lokr", "LokrModule", {"use_tucker": True, "decompose_both": True, "lora_dim": 1}),
    "lokr, whole": ("lokr", "LokrModule", {"full_matrix": True}),
    "lokr, factor 2": ("lokr", "LokrModule", {"factor": 2, "lora_dim": 1, "weight_decompose": True}),
    "lokr, unbalanced": ("lokr", "LokrModule", {"unbalanced_factorization": True, "lora_dim": 1}),
    "lora, DoRA": ("locon", "LoConModule", {"weight_decompose": True}),
    "lora, DoRA by input": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "locon, Tucker and DoRA": ("locon", "LoConModule", {"use_tucker": True, "weight_decompose": True}),
    "rank-stabilised": ("locon", "LoConModule", {"rs_lora": True}),
    "whole difference": ("full", "FullModule", {}),
}


def lycoris_modules(unet, file, name, options, modules):
    """Random LyCORIS layers in place of a UNet's; returns what a kohya file would hold."""
    import importlib

    make = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    tensors, layers = {}, dict(unet.named_modules())
    options = {"lora_dim": 2, "alpha": 3, **options}
    for number, module in enumerate(modules):
        layer = make(f"lora_unet_{module.replace('.', '_')}", layers[module], 1.0, **options)
        generator = torch.Generator().manual_seed(number)
        for parameter in layer.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
        layer.apply_to()
        tensors |= {
            f"{layer.lora_name}.{key}": value
            for key, value in (layer.custom_state_dict() or layer.state_dict()).items()
        }
        unet.register_module(f"kept_{number}", layer)
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}


@pytest.mark.parametrize("case", list(LYCORIS))
def test_computed_as_lycoris_runs_it(make_unet, tmp_path, case):
    """The output of the UNet with LyCORIS's layers running is that after the merge of the file they would save."""
    file, name, options = LYCORIS[case]
    running, merged = make_unet(), make_unet()
    modules = ["conv_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.resnets.0.conv1"]
    modules += ["up_blocks.1.attentions.0.proj_out", "down_blocks.1.resnets.0.time_emb_proj"]
    with torch.no_grad():
        tensors = lycoris_modules(running, file, name, options, modules)
    save_file(tensors, tmp_path / "l.safetensors")
    base = output(merged)
    merge_delta(merged, tmp_path / "l.safetensors")
    assert relative(output(running), base) > 1e-3
    assert relative(output(merged), output(running)) < 2e-6


def test_norms_of_lycoris(make_unet, tmp_path):
    running, merged = make_unet(), make_unet()
    modules = ["conv_norm_out", "mid_block.resnets.0.norm1", "mid_block.attentions.0.transformer_blocks.0.norm2"]
    with torch.no_grad():
        tensors = lycoris_modules(running, "norms", "NormModule", {}, modules)
    assert {key.rpartition(".")[2] for key in tensors} == {"w_norm", "b_norm"}
    merge_delta(merged, tensors)
    assert relative(output(merged), output(running)) < 2e-6


@pytest.mark.parametrize("spelling", ["kohya", "ComfyUI"])
def test_differences_are_exact(make_unet, bits, same, make_delta, spelling):
    """A whole delta as `.diff` and `.diff_b` is the delta to the bit; ComfyUI extracts under original names."""
    unet = make_unet(layers_per_block=2)
    delta = make_delta(unet, dtype=torch.float32)
    names = original_names(unet)
    tensors = {}
    for name, value in delta.items():
        module, _, parameter = name.rpartition(".")
        stem = f"lora_unet_{module.replace('.', '_')}"
        if spelling == "ComfyUI":
            stem = f"diffusion_model.{names[name].rpartition('.')[0]}"
        assert stem != "diffusion_model."
        tensors[f"{stem}.{'diff' if parameter == 'weight' else 'diff_b'}"] = value
    plain, other = make_unet(layers_per_block=2), make_unet(layers_per_block=2)
    merge_delta(plain, delta)
    merge_delta(other, tensors)
    assert same(bits(plain), bits(other))


LOHA = {f"hada_w{one}_{two}": torch.ones(8, 2) if two == "a" else torch.ones(2, 36) for one in "12" for two in "ab"}
LOKR = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(2, 18)}
PAIR = {"lora_down.weight": torch.ones(2, 4, 3, 3), "lora_up.weight": torch.ones(8, 2, 1, 1)}
BAD = {
    "half a LoHa": ({**LOHA, "hada_w2_b": None}, "do not belong together"),
    "ranks of a LoHa": ({**LOHA, "hada_w2_b": torch.ones(3, 36)}, "do not belong together"),
    "one core": ({**LOHA, "hada_t1": torch.ones(2, 2, 3, 3)}, "do not belong together"),
    "half a LoKr": ({**LOKR, "lokr_w2_b": None}, "do not belong together"),
    "twice a factor": ({**LOKR, "lokr_w2": torch.ones(4, 2, 3, 3)}, "do not belong together"),
    "integers": ({**LOKR, "lokr_w1": torch.ones(2, 2, dtype=torch.int32)}, "not floating point"),
    "two changes": ({**LOHA, **LOKR}, "more than one change"),
    "pair and difference": ({**PAIR, "diff": torch.ones(8, 4, 3, 3)}, "more than one change"),
    "a lone magnitude": ({"dora_scale": torch.ones(8, 1, 1, 1)}, "without factors"),
    "a magnitude's shape": ({**PAIR, "dora_scale": torch.ones(7, 1, 1, 1)}, "is no magnitude"),
    "a lone bias": ({"lora_up.bias": torch.ones(8)}, "without factors"),
    "not finite": ({**LOHA, "hada_w1_a": torch.full((8, 2), float("nan"))}, "NaN or Inf"),
    "not finite magnitude": ({**PAIR, "dora_scale": torch.full((8, 1, 1, 1), float("inf"))}, "NaN or Inf"),
    "a difference's shape": ({"diff": torch.ones(7, 4, 3, 3)}, "Misshapen"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_what_does_not_fit_is_told_before_anything_changes(unet, bits, same, case):
    before, (tensors, words) = bits(unet), BAD[case]
    source = {f"lora_unet_conv_in.{key}": value for key, value in tensors.items() if value is not None}
    with pytest.raises((WeightSourceError, MergeError), match=words):
        merge_delta(unet, source)
    assert same(bits(unet), before)


def test_what_they_are_is_told(unet, tmp_path):
    for kind, options, words in (("loha", {}, "LoHa"), ("lokr", {}, "LoKr"), ("lora", {"use_dora": True}, "DoRA")):
        saved(peft_adapter(unet, kind, options), tmp_path / kind)
        assert words in describe_weights(tmp_path / kind).form
        with pytest.raises(WeightSourceError, match=f"{words} .*no low-rank pairs.*merge_delta"):
            convert_lora(tmp_path / kind, tmp_path / "out.safetensors", "kohya")


def test_text_encoder_layers_of_a_loha_are_left_out_with_advice_that_works(unet):
    """diffusers does not load a LoHa, so it is not advised."""
    text = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{key}": value for key, value in LOHA.items()}
    both = text | {f"lora_unet_conv_in.{key}": value for key, value in LOHA.items()}
    with pytest.warns(UserWarning, match="1 layers .* for text encoders.*the tool that made the file"):
        merge_delta(unet, both)
    with pytest.raises(WeightSourceError, match=r"no layer for a UNet.*the tool that made the file"):
        merge_delta(unet, text)


def test_extraction_and_smaller_forms_take_them_as_deltas(unet, make_unet, tmp_path):
    """A LoHa is a delta like any other, its flat convolutions too: at full rank the LoRA of it is it."""
    targets = ["to_q", "to_out.0", "conv1", "conv_in", "conv_shortcut", "downsamplers.0.conv"]
    saved(peft_adapter(unet, "loha", {"target_modules": targets}), tmp_path / "loha")
    extract_lora(tmp_path / "loha", tmp_path / "l.safetensors", rank=64, exact=True, dtype=torch.float32)
    other = make_unet()
    merge_delta(unet, tmp_path / "loha")
    merge_delta(other, tmp_path / "l.safetensors")
    for name, weight in weights_of(unet).items():
        assert torch.allclose(weight, other.state_dict()[name], atol=1e-5), name


@pytest.mark.parametrize(
    ("module", "family"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "a UNet of unknown width"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "a UNet with text embeddings of width 6"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "text encoders alone"),
    ],
)
def test_a_lora_is_said_to_be_for_what_its_layers_show(module, family):
    """A UNet of which no layer is changed that reads text is no UNet without text."""
    pair = {f"{module}.lora_A.weight": torch.ones(2, 6), f"{module}.lora_B.weight": torch.ones(4, 2)}
    assert describe_weights(pair).family == family
    loha = {f"{module}.hada_w{one}_{side}": torch.ones(2, 2) for one in "12" for side in "ab"}
    found = describe_weights({**loha, **{name: torch.ones(2, 6) for name in loha if name.endswith("_b")}})
    assert found.family == family and found.form == "LoHa layers"
