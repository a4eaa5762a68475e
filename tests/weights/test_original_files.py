"""Original-format files with EMA weights, and of the UNet alone: read as diffusers' own converter reads them."""

import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from ldm_names import CONFIGS, ldm_state
from safetensors.torch import load_file, save_file

from perflow_diffusers.weights import (
    MergeError,
    WeightSourceError,
    compute_delta,
    describe_weights,
    merge_delta,
    merge_files,
    open_weights,
)
from perflow_diffusers.weights.read import single_file
from perflow_diffusers.weights.read.original_file import ema_names

_TINY = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 11),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
}
#: By the width of the text embedding.
MODELS = {
    "SD 1.x": (768, {**_BLOCKS}),
    "SD 2.x": (1024, {**_BLOCKS, "use_linear_projection": True}),
    "SDXL": (2048, {**_XL_BLOCKS, "use_linear_projection": True}),
    "inpainting": (768, {**_BLOCKS, "in_channels": 9}),
}
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


@pytest.fixture(params=list(MODELS))
def model(request, monkeypatch):
    """A tiny UNet of a family, known by the width of its text embedding, and the family's name."""
    torch.manual_seed(0)
    width, more = MODELS[request.param]
    config = {**_TINY, **more, "cross_attention_dim": width}
    monkeypatch.setitem(single_file.UNET_CONFIGS, width, {**config, "in_channels": 4})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "SD 1.x" if request.param == "inpainting" else request.param
    return UNet2DConditionModel(**config).requires_grad_(False), name


def means_of(state):
    """As LitEma registers them: no dots, fp32, and two counters; here other numbers than those as trained."""
    means = {f"model_ema.{f'diffusion_model.{name}'.replace('.', '')}": 0.9 * v.float() for name, v in state.items()}
    return {**means, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def judged(unet, checkpoint, ema):
    """What diffusers' converter makes of a checkpoint."""
    return convert_ldm_unet_checkpoint(checkpoint, {**unet.config, "layers_per_block": 2}, extract_ema=ema)


def equal(found, wanted):
    return set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_checkpoint_with_ema_weights(model, tmp_path, caplog):
    unet, family = model
    state = ldm_state(unet)
    checkpoint = {f"model.diffusion_model.{name}": value for name, value in state.items()} | means_of(state)
    checkpoint["first_stage_model.decoder.conv_in.weight"] = torch.ones(3)
    checkpoint |= {f"cond_stage_model.{number}": torch.ones(1) for number in range(3)}
    path = tmp_path / "v1-5-pruned.safetensors"
    save_file(checkpoint, path)
    zero = {name: torch.zeros_like(value) for name, value in unet.state_dict().items()}
    plain, means = judged(unet, dict(checkpoint), False), judged(unet, dict(checkpoint), True)
    assert not equal(plain, means) and equal(plain, unet.state_dict())
    ema = open_weights(path, extract_ema=True)
    merge_files(path, zero, tmp_path / "plain.safetensors")
    assert "weights as trained and their EMA" in caplog.text and "extract_ema=True" in caplog.text
    caplog.clear()
    merge_files(ema, zero, tmp_path / "ema.safetensors")
    assert "EMA" not in caplog.text
    assert equal(load_file(tmp_path / "plain.safetensors"), plain)
    assert equal(load_file(tmp_path / "ema.safetensors"), means)
    difference = compute_delta(path, ema, tmp_path / "d.safetensors")
    assert equal(dict(difference), {name: means[name] - plain[name] for name in plain})
    assert difference.metadata["tuned"] == "v1-5-pruned.safetensors (EMA)"
    assert difference.metadata["base"] == "v1-5-pruned.safetensors"
    said = describe_weights(path)
    assert said.form == "original checkpoint, with EMA weights" and said.family == family


def test_a_file_that_has_only_ema_weights(model, tmp_path, caplog):
    unet, family = model
    state = ldm_state(unet)
    both = {f"model.diffusion_model.{name}": value for name, value in state.items()} | means_of(state)
    save_file(means_of(state), tmp_path / "ema.safetensors")
    wanted = judged(unet, both, True)
    with caplog.at_level(logging.INFO):
        logging.getLogger("diffusers.perflow").setLevel(logging.INFO)
        found = single_file.unet_of_single_file(open_weights(tmp_path / "ema.safetensors"))
        logging.getLogger("diffusers.perflow").setLevel(logging.NOTSET)
    assert equal(dict(found), wanted) and "has only EMA weights" in caplog.text
    again = single_file.unet_of_single_file(open_weights(tmp_path / "ema.safetensors", extract_ema=True))
    assert equal(dict(again), wanted)
    said = describe_weights(tmp_path / "ema.safetensors")
    assert said.form == "original UNet, EMA weights only" and said.family == family


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_file_of_the_unet_alone(model, prefix, tmp_path):
    unet, family = model
    path = tmp_path / "unet.safetensors"
    save_file({prefix + name: value for name, value in ldm_state(unet).items()}, path)
    wanted = judged(unet, {f"model.diffusion_model.{name}": value for name, value in ldm_state(unet).items()}, False)
    tuned = {name: 1.1 * value for name, value in wanted.items()}
    assert equal(dict(compute_delta(path, tuned)), {name: tuned[name] - wanted[name] for name in wanted})
    assert equal(dict(compute_delta(tuned, path)), {name: wanted[name] - tuned[name] for name in wanted})
    delta = {name: 0.1 * value for name, value in wanted.items()}
    merge_files(path, delta, tmp_path / "out.safetensors")
    with merge_delta(unet, delta):
        assert equal(load_file(tmp_path / "out.safetensors"), unet.state_dict())
    said = describe_weights(path)
    assert said.form == "original UNet" and said.family == family and said.kind == "weights"
    with pytest.raises(MergeError, match="complete checkpoint in the original format"):
        merge_delta(unet, path)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_name_without_dots_has_one_reading(family):
    with torch.device("meta"):
        state = ldm_state(UNet2DConditionModel(**CONFIGS[family]))
    flat = {f"model_ema.{f'diffusion_model.{name}'.replace('.', '')}": name for name in state}
    assert len(flat) == len(state)
    assert ema_names(flat) == {f"model.diffusion_model.{name}": key for key, name in flat.items()}


def test_what_has_no_ema_says_so(unet, tmp_path):
    unet.save_pretrained(tmp_path / "unet")
    for source in (tmp_path / "unet", unet, dict(unet.state_dict())):
        with pytest.raises(WeightSourceError, match=r"has no EMA weights.*Leave extract_ema off"):
            open_weights(source, extract_ema=True)


def test_a_lora_in_original_spelling_is_no_checkpoint():
    names = ("lora_A.weight", "lora_B.weight")
    lora = {f"diffusion_model.input_blocks.1.1.proj_in.{name}": torch.ones(2, 2) for name in names}
    said = describe_weights(lora)
    assert said.kind == "lora" and "original" not in said.form
