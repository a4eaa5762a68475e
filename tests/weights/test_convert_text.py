"""LoRAs of UNet and text encoders between kohya and diffusers: plain diffusers gets the same weights from each."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from ldm_names import CONFIGS
from lora_pipelines import (
    FAMILIES,
    added,
    distance,
    fused,
    kohya_file_tensors,
    make_pipe,
    random_layers,
    save_with_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import convert_lora, open_weights
from perflow_diffusers.weights.read import lora_names

CLOSE = 1e-7  # fp32: half a unit in the last place of weights of about 1


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def config(file):
    return json.loads(header(file)["lora_adapter_metadata"])


def test_diffusers_loads_a_kohya_file_and_its_conversion_to_the_same_weights(family, tmp_path):
    layers = random_layers(make_pipe(family), uniform=True)
    kohya = tmp_path / "k.safetensors"
    save_file(kohya_file_tensors(make_pipe(family), layers), kohya)
    ours = fused(family, convert_lora(kohya, tmp_path / "d.safetensors", "diffusers"))
    assert distance(ours, fused(family, kohya)) <= CLOSE
    assert distance(ours, added(family, layers)) <= CLOSE


def test_every_rank_and_alpha_of_a_kohya_file_reaches_its_layer(family, tmp_path):
    layers = random_layers(make_pipe(family))
    kohya = tmp_path / "k.safetensors"
    save_file(kohya_file_tensors(make_pipe(family), layers), kohya)
    ours = convert_lora(kohya, tmp_path / "d.safetensors", "diffusers")
    assert distance(fused(family, ours), added(family, layers)) <= CLOSE
    back = load_file(convert_lora(ours, tmp_path / "b.safetensors", "kohya"))
    given = load_file(kohya)
    assert back.keys() == given.keys() and all(torch.equal(back[name], given[name]) for name in given)


def test_diffusers_loads_its_own_file_and_our_kohya_file_to_the_same_weights(family, tmp_path):
    layers = random_layers(make_pipe(family), uniform=True)
    own = save_with_diffusers(make_pipe(family), layers, tmp_path)
    kohya = convert_lora(own, tmp_path / "k.safetensors", "kohya")
    assert load_file(kohya).keys() == kohya_file_tensors(make_pipe(family), layers).keys()
    wanted = fused(family, own)
    assert distance(wanted, added(family, layers)) <= CLOSE
    assert distance(fused(family, kohya), wanted) <= CLOSE


def test_diffusers_own_file_comes_back_from_kohya(family, tmp_path):
    layers = random_layers(make_pipe(family))
    own = save_with_diffusers(make_pipe(family), layers, tmp_path)
    kohya = convert_lora(own, tmp_path / "k.safetensors", "kohya")
    back = convert_lora(kohya, tmp_path / "b.safetensors", "diffusers")
    assert distance(fused(family, back), added(family, layers)) <= CLOSE
    assert distance(fused(family, own), added(family, layers)) <= CLOSE


def test_files_of_older_transformers(tmp_path):
    """`text_model.` stands before every name, in the config, too; transformers 5 has no such module."""
    layers = {key: value for key, value in random_layers(make_pipe("sd15")).items() if key[0] == "text_encoder"}
    tensors, names = {}, {}
    for (_, module), (down, up, alpha) in layers.items():
        tensors[f"text_encoder.text_model.{module}.lora_A.weight"] = down
        tensors[f"text_encoder.text_model.{module}.lora_B.weight"] = up
        names[f"text_model.{module}"] = (len(down), alpha)
    old = {
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 1,
        "text_encoder.rank_pattern": {name: rank for name, (rank, _) in names.items()},
        "text_encoder.alpha_pattern": {f"^{name}": alpha for name, (_, alpha) in names.items()},
        "text_encoder.target_modules": list(names),
    }
    path = tmp_path / "old.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(old)})
    ours = convert_lora(path, tmp_path / "d.safetensors", "diffusers")
    assert "text_model" not in header(ours)["lora_adapter_metadata"]
    assert distance(fused("sd15", ours), added("sd15", layers)) <= CLOSE
    kohya = convert_lora(path, tmp_path / "k.safetensors", "kohya")
    again = convert_lora(kohya, tmp_path / "a.safetensors", "diffusers")
    assert distance(fused("sd15", again), added("sd15", layers)) <= CLOSE


def test_names_of_the_config_fit_models_with_text_model_and_without(tmp_path):
    """PEFT matches the end of a name, so one file serves every version of transformers."""
    from peft.utils.other import get_pattern_key

    layers = random_layers(make_pipe("sdxl"))
    save_file(kohya_file_tensors(make_pipe("sdxl"), layers), tmp_path / "k.safetensors")
    found = config(convert_lora(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers"))
    for component in ("text_encoder", "text_encoder_2"):
        for target in found[f"{component}.target_modules"]:
            assert not target.startswith("text_model.")
        patterns = found[f"{component}.alpha_pattern"]
        for pattern in patterns:
            for model_name in (pattern, f"text_model.{pattern}"):
                assert get_pattern_key(patterns, model_name) == pattern


@pytest.mark.parametrize("prefix", ["lora_te_", "lora_te1_", "lora_te2_"])
def test_each_prefix_is_one_component_and_comes_back(prefix, tmp_path):
    component = "text_encoder_2" if prefix == "lora_te2_" else "text_encoder"
    stem = f"{prefix}text_model_encoder_layers_11_self_attn_out_proj"
    tensors = {f"{stem}.lora_down.weight": torch.rand(2, 4), f"{stem}.lora_up.weight": torch.rand(4, 2)}
    save_file(tensors, tmp_path / "k.safetensors")
    there = convert_lora(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers")
    place = f"{component}.text_model.encoder.layers.11.self_attn.out_proj"
    assert load_file(there).keys() == {f"{place}.lora_A.weight", f"{place}.lora_B.weight"}
    assert load_file(convert_lora(there, tmp_path / "b.safetensors", "kohya")).keys() == tensors.keys()


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_names_of_old_diffusers_and_of_comfyui(encoder, tmp_path):
    down, up = torch.rand(2, 4), torch.rand(4, 2)
    comfy = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[encoder]
    old = f"{encoder}.text_model.encoder.layers.0.self_attn.to_out_lora"
    new = f"text_encoders.{comfy}.transformer.text_model.encoder.layers.0.self_attn.out_proj"
    wanted = f"{encoder}.text_model.encoder.layers.0.self_attn.out_proj"
    for number, (first, second) in enumerate(
        ((f"{old}.down.weight", f"{old}.up.weight"), (f"{new}.lora_down.weight", f"{new}.lora_up.weight"))
    ):
        out = convert_lora({first: down, second: up}, tmp_path / f"{number}.safetensors", "diffusers")
        assert load_file(out).keys() == {f"{wanted}.lora_A.weight", f"{wanted}.lora_B.weight"}


def test_every_word_is_kept_whole():
    for module in ("encoder.layers.0.self_attn.out_proj", "text_model.encoder.layers.10.mlp.fc2", "text_projection"):
        assert lora_names.dotted(module.replace(".", "_")) == module
    assert open_weights({"text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight": torch.ones(1, 2)}).kind == "lora"


def test_a_model_settles_how_blocks_are_counted(tmp_path):
    """One layer alone could be of SDXL or of a pruned model: without a model its kohya name counts nothing."""
    to_q = "attentions.0.transformer_blocks.0.attn1.to_q"
    stem = f"unet.up_blocks.1.{to_q}"
    lora = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    sdxl = {"text_encoder_2.text_projection.lora_A.weight": torch.ones(2, 8)}
    sdxl["text_encoder_2.text_projection.lora_B.weight"] = torch.ones(8, 2)
    flat = to_q.replace(".", "_")
    tail = flat.removeprefix("attentions_0_")
    with torch.device("meta"):
        koala = UNet2DConditionModel(**CONFIGS["KOALA-1B"])
    unet = make_pipe("sdxl").unet
    names = {None: f"up_blocks_1_{flat}", unet: f"output_blocks_3_1_{tail}", koala: f"output_blocks_2_1_{tail}"}
    for model, name in names.items():
        out = convert_lora({**lora, **sdxl}, tmp_path / "k.safetensors", "kohya", unet=model, overwrite=True)
        assert f"lora_unet_{name}.lora_down.weight" in load_file(out)
        assert "lora_te2_text_projection.lora_up.weight" in load_file(out)
        back = convert_lora(out, tmp_path / "d.safetensors", "diffusers", unet=model, overwrite=True)
        assert load_file(back).keys() == {*lora, *sdxl}
    koala_name = f"lora_unet_output_blocks_2_1_{tail}"
    given = {f"{koala_name}.lora_down.weight": torch.ones(2, 8), f"{koala_name}.lora_up.weight": torch.ones(8, 2)}
    with pytest.warns(UserWarning, match="too few layers to tell.*`unet=`"):
        convert_lora(given, tmp_path / "d.safetensors", "diffusers", overwrite=True)


def test_diffusers_reads_names_that_count_nothing(tmp_path):
    """All layers of an SDXL UNet without attention: whether upsamplers stand behind one cannot be told."""
    layers = random_layers(make_pipe("sdxl"), uniform=True)
    layers = {place: layer for place, layer in layers.items() if "attentions" not in place[1]}
    kohya = convert_lora(save_with_diffusers(make_pipe("sdxl"), layers, tmp_path), tmp_path / "k.safetensors", "kohya")
    assert not any("put_blocks" in name for name in load_file(kohya))
    assert distance(fused("sdxl", kohya), added("sdxl", layers)) <= CLOSE
