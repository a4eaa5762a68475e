"""Deltas for ComfyUI: its key map and its way of adding, written again here, give base + strength * delta exactly."""

import pytest
import torch
from lora_files import original_names, write_kohya
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import DeltaError, check_comfy, delta_for_comfy, merge_delta, open_weights, shrink_delta

XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "use_linear_projection": True,
    "transformer_layers_per_block": (2, 1),
    "layers_per_block": 2,
}
FAMILIES = {
    "SD 1.x": {"layers_per_block": 2},
    "SD 2.x": {"layers_per_block": 2, "use_linear_projection": True, "attention_head_dim": (2, 4)},
    "SDXL": XL,
    "pruned": {"layers_per_block": 1},
}


def map_of_comfy(unet):
    """{diffusers' module: original module}, as ComfyUI's `unet_to_diffusers` makes it from the model's own config.

    Blocks are numbered by `num_res_blocks`; a down block ends with a downsampler, an up block has one ResNet more.
    """
    config = unet.config
    layers, blocks = config["layers_per_block"], len(config["block_out_channels"])
    depth = config["transformer_layers_per_block"]
    depths = [depth] * blocks if isinstance(depth, int) else list(depth)
    resnet = {"in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.3": "conv2", "in_layers.0": "norm1"}
    resnet |= {"skip_connection": "conv_shortcut", "out_layers.0": "norm2"}
    inside = ["norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"]
    inside += [f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")]
    found = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    for side in ("add", "class"):
        found |= {f"{side}_embedding.linear_{1 + n // 2}": f"label_emb.0.{n}" for n in (0, 2)}
    found |= {f"time_embedding.linear_{1 + n // 2}": f"time_embed.{n}" for n in (0, 2)}

    def add_resnet(place, old):
        found.update({f"{place}.{new}": f"{old}.{name}" for name, new in resnet.items()})

    def add_attention(place, old, count):
        found.update({f"{place}.{name}": f"{old}.{name}" for name in ("norm", "proj_in", "proj_out")})
        for n in range(count):
            found.update({f"{place}.transformer_blocks.{n}.{x}": f"{old}.transformer_blocks.{n}.{x}" for x in inside})

    number = 1
    for block in range(blocks):
        for layer in range(layers):
            add_resnet(f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{number}.0")
            if "CrossAttn" in config["down_block_types"][block]:
                add_attention(f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{number}.1", depths[block])
            number += 1
        found[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    add_resnet("mid_block.resnets.0", "middle_block.0")
    add_attention("mid_block.attentions.0", "middle_block.1", depths[-1])
    add_resnet("mid_block.resnets.1", "middle_block.2")
    number = 0
    for block in range(blocks):
        for layer in range(layers + 1):
            place = 1
            add_resnet(f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{number}.0")
            if "CrossAttn" in config["up_block_types"][block]:
                count = depths[blocks - 1 - block]
                add_attention(f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{number}.1", count)
                place = 2
            if layer == layers:
                found[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number}.{place}.conv"
            number += 1
    return found


def loaded_by_comfy(unet, path, originals, strength):
    """Original-format weights after ComfyUI's `load_lora` and `calculate_weight`; every key of the file is used."""
    tensors, weights, used = load_file(path), dict(originals), set()
    for new, old in map_of_comfy(unet).items():
        for suffix, leaf in (("diff", "weight"), ("diff_b", "bias")):
            key = f"lora_unet_{new.replace('.', '_')}.{suffix}"
            if key in tensors and f"{old}.{leaf}" in weights:
                weight = weights[f"{old}.{leaf}"]
                assert tensors[key].shape == weight.shape
                weights[f"{old}.{leaf}"] = weight + (strength * tensors[key].float()).to(weight.dtype)
                used.add(key)
    assert used == set(tensors)
    return weights


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_comfy_adds_the_whole_delta(make_unet, make_delta, tmp_path, family, strength):
    """Where each weight of diffusers stands in an original checkpoint is what diffusers' own converter says."""
    unet = make_unet(**FAMILIES[family])
    delta, names = make_delta(unet, dtype=torch.float32), original_names(unet)
    path = delta_for_comfy(delta, tmp_path / "perflow.safetensors")
    assert len(load_file(path)) == len(delta)
    base = unet.state_dict()
    found = loaded_by_comfy(unet, path, {names[name]: value for name, value in base.items()}, strength)
    for name, value in base.items():
        assert torch.equal(found[names[name]], value + strength * delta[name]), name


def test_the_file_is_the_delta_to_every_bit_and_keeps_its_settings(make_unet, delta_file, delta, bits, same, tmp_path):
    path = delta_for_comfy(delta_file, tmp_path / "perflow.safetensors")
    assert open_weights(path).metadata["prediction_type"] == "ddim_eps"
    assert {value.dtype for value in load_file(path).values()} == {value.dtype for value in delta.values()}
    plain, other = make_unet(), make_unet()
    merge_delta(plain, delta_file)
    merge_delta(other, path)
    assert same(bits(plain), bits(other))


def test_an_int8_delta_is_written_as_its_numbers(make_unet, delta_file, bits, same, tmp_path):
    small = shrink_delta(delta_file, tmp_path / "small.safetensors", "int8").path
    path = delta_for_comfy(small, tmp_path / "perflow.safetensors")
    plain, other = make_unet(), make_unet()
    merge_delta(plain, small)
    merge_delta(other, path)
    assert same(bits(plain), bits(other))


def test_what_comfy_would_leave_out_is_refused(delta, factors, tmp_path):
    out = tmp_path / "out.safetensors"
    extra = {
        "time_embedding.cond_proj.weight": torch.ones(2, 2),
        "mid_block.motion_modules.0.norm.weight": torch.ones(2),
    }
    for call in (lambda given: delta_for_comfy(given, out), check_comfy):
        with pytest.raises(DeltaError, match=r"2 tensors .*cond_proj.*merge_files"):
            call({**delta, **extra})
        with pytest.raises(DeltaError, match=r"is a LoRA already.*kohya"):
            call(write_kohya(tmp_path / "k.safetensors", factors))
        with pytest.raises(DeltaError, match="empty"):
            call({})
    assert not out.exists() and f"{len(delta)} tensors" in check_comfy(delta)


def test_an_old_file_is_kept(delta, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="overwrite"):
        delta_for_comfy(delta, tmp_path / "out.safetensors")
    assert list(load_file(tmp_path / "out.safetensors")) == ["x"]
    delta_for_comfy(delta, tmp_path / "out.safetensors", overwrite=True)
