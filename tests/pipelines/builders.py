"""Tiny networks with random weights in real diffusers pipelines; every network is built once a session and shared."""

import functools

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    MotionAdapter,
    MultiControlNetModel,
    T2IAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from perflow_diffusers.miniature import miniature_folder

TEXT = 16
SIDE = 16  # pixels; latents are half as wide

# What stock checkpoints of the two families have in their scheduler folders.
STOCK = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

# Attention in the upper block as in Stable Diffusion, or in the lower as in SDXL.
SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}

SHAPE = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def stock_scheduler(prediction_type="epsilon"):
    return DDIMScheduler(**STOCK, prediction_type=prediction_type)


def randomised(network, seed=0, scale=None):
    """Ready for use; with `scale`, layers that start at zero get random weights, so that they take part."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if scale is not None and not parameter.any():
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@functools.cache
def tokenizer():
    return CLIPTokenizer.from_pretrained(miniature_folder() / "avatars" / "tokenizer")


def text_encoder(cls=CLIPTextModel, seed=1):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer().model_max_length,
        projection_dim=TEXT,
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
    )
    return randomised(cls(config))


@functools.cache
def sd_text_encoder():
    return text_encoder()


@functools.cache
def xl_text_encoders():
    return text_encoder(seed=2), text_encoder(CLIPTextModelWithProjection, seed=3)


@functools.cache
def vae(**extra):
    torch.manual_seed(4)
    network = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        **extra,
    )
    return randomised(network)


@functools.cache
def unet(in_channels=4, seed=0, **extra):
    torch.manual_seed(seed)
    return randomised(
        UNet2DConditionModel(
            **SD_BLOCKS,
            **SHAPE,
            sample_size=SIDE // 2,
            in_channels=in_channels,
            out_channels=4,
            cross_attention_dim=TEXT,
        )
    )


def added_conditions(text, time_ids):
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": time_ids * 8 + TEXT,
        "cross_attention_dim": text,
    }


@functools.cache
def xl_unet(in_channels=4, time_ids=6, text=2 * TEXT, seed=0, attention_above=False):
    torch.manual_seed(seed)
    return randomised(
        UNet2DConditionModel(
            **(SD_BLOCKS if attention_above else XL_BLOCKS),
            **SHAPE,
            **added_conditions(text, time_ids),
            sample_size=SIDE // 2,
            in_channels=in_channels,
            out_channels=4,
            use_linear_projection=True,
        )
    )


@functools.cache
def controlnet(seed=7, xl=False):
    torch.manual_seed(seed)
    extra = added_conditions(2 * TEXT, 6) if xl else {"cross_attention_dim": TEXT}
    network = ControlNetModel(
        **SHAPE,
        **extra,
        down_block_types=(XL_BLOCKS if xl else SD_BLOCKS)["down_block_types"],
        conditioning_embedding_out_channels=(8, 16),
        use_linear_projection=xl,
    )
    return randomised(network, seed, scale=0.3)


@functools.cache
def two_controlnets():
    return MultiControlNetModel([controlnet(7), controlnet(8)])


@functools.cache
def t2i_adapter():
    torch.manual_seed(9)
    return randomised(
        T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    )


@functools.cache
def motion_adapter():
    torch.manual_seed(10)
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    return randomised(adapter, scale=0.3)


@functools.cache
def motion_unet():
    return UNetMotionModel.from_unet2d(unet(), motion_adapter()).eval()


def sd(unet_=None, **extra):
    """Components of a Stable Diffusion pipeline."""
    return {
        "vae": vae(),
        "text_encoder": sd_text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet_ or unet(),
        "scheduler": stock_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        **extra,
    }


def xl(unet_=None, **extra):
    """Components of a Stable Diffusion XL pipeline."""
    first, second = xl_text_encoders()
    return {
        "vae": vae(),
        "text_encoder": first,
        "text_encoder_2": second,
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet_ or xl_unet(),
        "scheduler": stock_scheduler(),
        "add_watermarker": False,
        **extra,
    }


def refiner(**extra):
    """Components of the SDXL refiner: one text encoder, aesthetic scores instead of target sizes."""
    return xl(
        xl_unet(time_ids=5, text=TEXT, seed=11),
        text_encoder=None,
        tokenizer=None,
        requires_aesthetics_score=True,
        **extra,
    )


def save_ip_adapter(folder, network, seed=12):
    """An IP-Adapter for `network` as files: random weights in the published layout and a tiny image encoder."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=TEXT,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder / "image_encoder")
    text, tokens = network.config.cross_attention_dim, 4
    weights = {
        "image_proj.proj.weight": torch.randn(tokens * text, TEXT),
        "image_proj.proj.bias": torch.randn(tokens * text),
        "image_proj.norm.weight": torch.ones(text),
        "image_proj.norm.bias": torch.zeros(text),
    }
    shapes = {k: v.shape for k, v in network.state_dict().items() if k.endswith("attn2.to_k.weight")}
    cross = [name for name in network.attn_processors if name.endswith("attn2.processor")]
    for i, name in enumerate(cross):
        shape = shapes[name.removesuffix("processor") + "to_k.weight"]
        for kind in "kv":
            weights[f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight"] = torch.randn(shape) / 4
    save_file(weights, folder / "ip-adapter.safetensors")


def picture(i, shift=0):
    """A smooth RGB picture; another one for every i and shift."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = [np.sin(2 * np.pi * ((i + 1) * x + c * y) + c + shift) for c in range(3)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(waves, -1)))


def right_half(shift=0):
    """A mask that repaints the right half (or, shifted, a quarter)."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, SIDE // 2 + 4 * shift :] = 255
    return Image.fromarray(mask)
