"""Which UNets take a delta of a stock UNet: it fits, changes what it should, runs, and is undone to the last bit."""

import pytest
import torch
from diffusers import (
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from perflow_diffusers import merge_delta

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
    "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
}


def stock(**changes):
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TINY, **changes}).eval().requires_grad_(False)


def motion(unet):
    """AnimateDiff: motion modules between the blocks of an image UNet."""
    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    return UNetMotionModel.from_unet2d(unet, adapter).eval().requires_grad_(False)


class ReferenceProcessor(torch.nn.Module):
    """Unique3D's: self-attention also sees the reference network's tokens, through an attention of its own."""

    def __init__(self, width):
        super().__init__()
        self.crosspond_attention = Attention(query_dim=width, heads=2, dim_head=width // 2, bias=True)
        self.stock = AttnProcessor2_0()

    def forward(self, attn, hidden_states, *args, **kwargs):
        return self.stock(attn, hidden_states, *args, **kwargs) + self.crosspond_attention(hidden_states)


class Unique3DLike:
    """Not a module: holds a UNet with 8 channels, class labels, processors with weights, and a second UNet in it."""

    def __init__(self):
        self.unet = stock(in_channels=8, num_class_embeds=4)
        for module in list(self.unet.modules()):
            if isinstance(module, Attention) and not module.is_cross_attention:
                module.set_processor(ReferenceProcessor(module.to_q.in_features).requires_grad_(False))
        self.unet.ref_unet = stock()


class Zero123PlusLike(torch.nn.Module):
    """A module that holds the UNet and runs it on the picture first; all keys begin with `unet.`."""

    def __init__(self):
        super().__init__()
        self.unet = stock()

    def forward(self, *args, **kwargs):
        return self.unet(*args, **kwargs)


def image_inputs(channels=4, **more):
    generator = torch.Generator().manual_seed(2)
    return {
        "sample": torch.randn(2, channels, 8, 8, generator=generator),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 1, 16, generator=generator),
        **more,
    }


def video_inputs(**more):
    frames = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    words = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(3))
    return {"sample": frames, "timestep": 500, "encoder_hidden_states": words, **more}


SDXL_CONDITION = {"added_cond_kwargs": {"text_embeds": torch.ones(1, 8), "time_ids": torch.ones(1, 6)}}

# name: (model, base of the delta, inputs, padded)
FITTING = {
    "inpainting, 9 channels": (lambda: stock(in_channels=9), stock, image_inputs(9), True),
    "InstructPix2Pix and Zero123, 8 channels": (lambda: stock(in_channels=8), stock, image_inputs(8), True),
    "image variations": (stock, stock, image_inputs(), False),
    "AnimateDiff on SD 1.5": (lambda: motion(stock()), stock, video_inputs(), False),
    "AnimateDiff on SDXL": (
        lambda: motion(stock(**SDXL)),
        lambda: stock(**SDXL),
        video_inputs(**SDXL_CONDITION),
        False,
    ),
    "Zero123++ wrapper": (Zero123PlusLike, stock, image_inputs(), False),
}


def delta_of(unet, size=0.02):
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(w.shape, generator=generator) * size for name, w in unet.state_dict().items()}


def check(model, holder, delta, values, padded):
    """Merge into `holder`, run `model`, undo; every number against base + delta."""
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = model(**values).sample
    handle = merge_delta(holder, delta)
    assert handle.report.padded == (("conv_in.weight",) if padded else ())
    for name, weight in model.state_dict().items():
        expected = base[name].clone()
        key = name.removeprefix("unet.")
        if key in delta:
            part = expected[:, :4] if padded and key == "conv_in.weight" else expected
            part += delta[key]
        assert torch.equal(weight, expected), name
    after = model(**values).sample
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-3
    handle.undo()
    assert all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model(**values).sample, before)


@pytest.mark.parametrize("name", FITTING)
def test_it_fits_runs_and_is_undone(name):
    make, base, values, padded = FITTING[name]
    model = make()
    check(model, model, delta_of(base()), values, padded)


def test_a_unique3d_like_wrapper_takes_it_with_its_reference_network_set_aside():
    wrapper = Unique3DLike()
    reference = wrapper.unet.ref_unet
    del wrapper.unet.ref_unet
    values = image_inputs(8, class_labels=torch.tensor([0, 1]))
    check(wrapper.unet, wrapper, delta_of(stock()), values, padded=True)
    base = {name: weight.clone() for name, weight in wrapper.unet.state_dict().items()}
    handle = merge_delta(wrapper, delta_of(stock()))
    wrapper.unet.ref_unet = reference
    handle.undo()
    after = wrapper.unet.state_dict()
    assert all(torch.equal(after[name], base[name]) for name in base)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: stock(cross_attention_dim=32), "text embeddings of width 16, the model is .*width 32"),
        (lambda: stock(**SDXL), "Missing in the delta"),
        (
            lambda: UNetSpatioTemporalConditionModel(
                sample_size=8,
                block_out_channels=(32, 64),
                layers_per_block=1,
                num_attention_heads=(2, 2),
                cross_attention_dim=16,
                projection_class_embeddings_input_dim=24,
                addition_time_embed_dim=8,
                down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            ),
            "Not in the model",
        ),
    ],
    ids=["other text width", "SDXL", "Stable Video Diffusion"],
)
def test_it_does_not_fit_and_nothing_changes(make, why):
    model = make()
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        merge_delta(model, delta_of(stock()))
    assert all(torch.equal(weight, base[name]) for name, weight in model.state_dict().items())
