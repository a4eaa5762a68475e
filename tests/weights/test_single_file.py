"""Original-format checkpoints in place of a model: the same weights under diffusers' names, without the Hub."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from ldm_names import ldm_state
from safetensors.torch import save_file

from perflow_diffusers.weights import DeltaError, compute_delta, content_hash, open_weights
from perflow_diffusers.weights.read import single_file

PREFIX = "model.diffusion_model."
# The smallest UNet whose layers are those of SDXL: its blocks with an upsampler all have attention.
TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
}


def original_format(unet, prefix=PREFIX):
    """Weights of a UNet under the names of single-file checkpoints."""
    return {f"{prefix}{name}": value for name, value in ldm_state(unet).items()}


@pytest.fixture
def tiny(monkeypatch):
    """A UNet, and its config in the place of that of SD 1.x."""
    torch.manual_seed(0)
    config = {**TINY, "cross_attention_dim": 768}
    monkeypatch.setitem(single_file.UNET_CONFIGS, 768, config)
    return UNet2DConditionModel(**config).half().requires_grad_(False)


@pytest.fixture
def checkpoint(tiny, tmp_path):
    path = tmp_path / "v1-5-pruned.safetensors"
    extra = {"first_stage_model.decoder.conv_in.weight": torch.ones(3), "cond_stage_model.x": torch.ones(2).int()}
    save_file({**original_format(tiny), **extra}, path)
    return path


def test_weights_are_those_of_the_model_in_their_dtype(tiny, checkpoint, bits, same, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = single_file.unet_of_single_file(open_weights(checkpoint))
    assert same(dict(found), bits(tiny))
    assert same(dict(single_file.unet_of_single_file(open_weights(dict(open_weights(checkpoint))))), bits(tiny))


def test_as_base_and_as_tuned_model(tiny, checkpoint, tmp_path):
    tuned = UNet2DConditionModel.from_config(tiny.config).half().requires_grad_(False)
    delta = compute_delta(checkpoint, tuned, tmp_path / "delta.safetensors", torch.float32)
    old, new = tiny.state_dict(), tuned.state_dict()
    assert all(torch.equal(delta[name], new[name].float() - old[name].float()) for name in old)
    assert delta.metadata["base"] == checkpoint.name and delta.metadata["base_hash"] == content_hash(tiny)
    back = compute_delta(tuned, checkpoint, dtype=torch.float32)
    assert all(torch.equal(back[name], -delta[name]) for name in old)
    assert compute_delta(checkpoint, tiny).dtypes["conv_in.bias"] == torch.float16


def test_inpainting_checkpoints_have_more_input_channels(tiny, tmp_path):
    wide = UNet2DConditionModel.from_config({**tiny.config, "in_channels": 9}).requires_grad_(False)
    save_file(original_format(wide), tmp_path / "inpainting.safetensors")
    found = single_file.unet_of_single_file(open_weights(tmp_path / "inpainting.safetensors"))
    assert torch.equal(found["conv_in.weight"], wide.conv_in.weight)


@pytest.mark.parametrize(("width", "count"), [(768, 859_520_964), (1024, 865_910_724), (2048, 2_567_463_684)])
def test_the_known_configs_are_those_of_the_families(width, count):
    """Numbers of parameters of the published UNets."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**single_file.UNET_CONFIGS[width])
    assert sum(weight.numel() for weight in unet.parameters()) == count
    assert unet.config.cross_attention_dim == width


def test_other_families_are_left_to_diffusers(unet, tmp_path, monkeypatch):
    path = tmp_path / "refiner.safetensors"
    save_file({f"{PREFIX}input_blocks.0.0.weight": torch.ones(1)}, path)
    asked = []
    monkeypatch.setattr(UNet2DConditionModel, "from_single_file", lambda *given, **rest: asked.append(given) or unet)
    assert compute_delta(path, unet).relative_norm == 0 and asked == [(str(path),)]
    with pytest.raises(DeltaError, match="pass its file"):
        compute_delta(dict(open_weights(path)), unet)


def test_a_damaged_checkpoint_is_told_with_a_way_out(tiny, checkpoint, tmp_path):
    broken = original_format(tiny)
    broken[f"{PREFIX}middle_block.0.in_layers.2.weight"] = torch.ones(3, 3)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(DeltaError, match=r"could not convert .*broken\.safetensors.*save_pretrained"):
        compute_delta(tmp_path / "broken.safetensors", tiny)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        compute_delta(checkpoint, tiny)


def test_missing_weights_are_not_filled_in(tiny, tmp_path):
    lacking = original_format(tiny)
    del lacking[f"{PREFIX}out.2.weight"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(DeltaError, match="weights of the UNet are missing"):
        compute_delta(tmp_path / "lacking.safetensors", tiny)
