"""LoRAs of other models are refused in words, whatever their layout; their names are never put under a UNet's."""

import pytest
import torch
from safetensors.torch import load_file

from perflow_diffusers.weights import MergeError, WeightSourceError, convert_lora, merge_delta, open_weights
from perflow_diffusers.weights.read.lora import lora_layers

TRANSFORMER = "a transformer"
THIRD = "a third text encoder"
OTHERS = {
    # diffusers
    "transformer.single_transformer_blocks.0.attn.to_q": TRANSFORMER,  # Flux
    "transformer.transformer_blocks.0.attn.add_q_proj": TRANSFORMER,  # SD 3
    "transformer_2.blocks.0.attn1.to_q": TRANSFORMER,  # Wan 2.2
    "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q": THIRD,
    "prior.down_blocks.0.0.attention.to_q": "a prior",
    "controlnet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "a ControlNet",
    # PEFT's own files
    "base_model.model.transformer_blocks.0.attn.to_q": TRANSFORMER,
    "base_model.model.single_transformer_blocks.0.proj_mlp": TRANSFORMER,
    "base_model.model.text_model.encoder.layers.0.self_attn.q_proj": "a text encoder without the name",
    "base_model.model.encoder.layers.0.self_attn.q_proj": "a text encoder without the name",
    "base_model.model.model.layers.0.self_attn.q_proj": "a language model",
    # the models' own names, and ComfyUI's
    "double_blocks.0.img_attn.qkv": TRANSFORMER,
    "diffusion_model.double_blocks.0.img_attn.qkv": TRANSFORMER,
    "diffusion_model.joint_blocks.0.x_block.attn.qkv": TRANSFORMER,
    "diffusion_model.blocks.0.self_attn.q": TRANSFORMER,
    "diffusion_model.layers.0.attention.to_q": TRANSFORMER,
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q": THIRD,
    # kohya's and OneTrainer's
    "lora_unet_double_blocks_0_img_attn_proj": TRANSFORMER,
    "lora_unet_single_blocks_0_linear1": TRANSFORMER,
    "lora_unet_joint_blocks_0_x_block_attn_qkv": TRANSFORMER,
    "lora_unet_transformer_blocks_0_attn1_to_q": TRANSFORMER,  # PixArt: every word is one of a UNet's
    "lora_unet_blocks_0_self_attn_q": TRANSFORMER,
    "lora_unet_layers_0_attention_to_q": TRANSFORMER,
    "lora_transformer_single_transformer_blocks_0_attn_to_q": TRANSFORMER,
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": THIRD,
    "lora_prior_unet_down_blocks_0_attention_to_q": "a prior",
}
KOHYA = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def pair(stem):
    down, up = ("lora_down", "lora_up") if "_blocks_" in stem or stem.startswith("lora_") else ("lora_A", "lora_B")
    return {f"{stem}.{down}.weight": torch.ones(2, 8), f"{stem}.{up}.weight": torch.ones(8, 2)}


@pytest.mark.parametrize("stem", list(OTHERS))
def test_other_models(unet, bits, same, tmp_path, stem):
    out = tmp_path / "x.safetensors"
    for given in (pair(stem), {**pair(stem), **pair(KOHYA)}):
        for layout in ("diffusers", "kohya"):
            with pytest.raises(WeightSourceError, match=f"is a LoRA for {OTHERS[stem]}"):
                convert_lora(given, out, layout)
        before = bits(unet)
        with pytest.raises(WeightSourceError, match=f"is a LoRA for {OTHERS[stem]}"):
            merge_delta(unet, given)
        assert same(bits(unet), before)
    assert not out.exists()


@pytest.mark.parametrize(
    ("stem", "module"),
    [
        ("down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.proj_in"),
        ("base_model.model.mid_block.resnets.0.conv1", "mid_block.resnets.0.conv1"),
        # Wonder3D's, AnimateDiff's in diffusers and as its authors name them
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn_joint_mid.to_q", None),
        ("unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_q", None),
        (
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.to_q",
            "down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_q",
        ),
        ("unet.odd_head", None),  # said to be the UNet's
    ],
)
def test_modules_of_unets_and_of_their_extensions(stem, module, tmp_path):
    out = convert_lora(pair(stem), tmp_path / "x.safetensors", "diffusers")
    place = f"unet.{module}" if module else stem
    assert load_file(out).keys() == {f"{place}.lora_A.weight", f"{place}.lora_B.weight"}


def test_a_module_of_the_model_at_hand_needs_no_known_name(unet):
    unet.extra_head = torch.nn.Linear(8, 8, bias=False)
    before = unet.extra_head.weight.detach().clone()
    merge_delta(unet, pair("extra_head"))
    assert torch.allclose(unet.extra_head.weight, before + 2)


def test_a_lora_whose_numbers_are_not_of_this_model_is_told_by_its_modules(unet, bits, same):
    """The UNet has one layer a block: SDXL's input_blocks.4 and 5 are no attention of it, whatever is counted."""
    stems = (f"lora_unet_input_blocks_{number}_1_transformer_blocks_0_attn2_to_k" for number in (4, 5, 7, 8))
    given = {key: value for stem in stems for key, value in pair(stem).items()}
    before = bits(unet)
    with pytest.raises(MergeError, match=r"Not in the model.*down_blocks\.2"):
        merge_delta(unet, given)
    assert same(bits(unet), before)


def test_bundled_embeddings_are_left_out_with_a_warning(unet, tmp_path):
    bundled = {
        "bundle_emb.style.string_to_param.*": torch.ones(2, 8),
        "bundle_emb.face.clip_l": torch.ones(2, 8),
        "bundle_emb.face.clip_g": torch.ones(2, 8),
    }
    layer = pair("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0")
    assert len(lora_layers(open_weights({**layer, **bundled}))) == 1
    with pytest.warns(UserWarning, match=r"2 textual inversions .*face, style.*load_textual_inversion") as caught:
        out = convert_lora({**layer, **bundled}, tmp_path / "x.safetensors", "kohya")
    assert caught[0].filename == __file__ and len(caught) == 1
    assert not any("bundle" in name for name in load_file(out))
    wide = {name: torch.ones(2, 16) if "A" in name else torch.ones(16, 2) for name in layer}
    before = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="2 textual inversions") as caught:
        merge_delta(unet, {**wide, **bundled})
    assert caught[0].filename == __file__
    assert torch.equal(unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_out[0].weight, before + 2)
