"""Flow-matching pipelines of diffusers around tiny random transformers, each with the arguments of a short call.

Prompts are embeddings, and results latents where nothing has to be encoded: their encoders are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from PIL import Image

TEXT = 16
_ATTENTION_MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")


@dataclass(frozen=True)
class Built:
    """A pipeline, the arguments of its call but for the steps, and how its network is told the level sigma."""

    pipe: Any
    arguments: dict[str, Any]
    told: Callable[[torch.Tensor], torch.Tensor] = lambda sigma: 1000 * sigma
    calls_a_step: int = 1


def embeds(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(masks=None):
    """A prompt and a negative one, (1, 5, TEXT) each; `masks` names the pipeline's arguments for all-ones masks."""
    given = {"prompt_embeds": embeds(1, 5, TEXT), "negative_prompt_embeds": embeds(1, 5, TEXT, seed=1)}
    return given | dict.fromkeys(masks or (), torch.ones(1, 5, dtype=torch.int64))


def picture(seed=0):
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def random(kind, **config):
    torch.manual_seed(0)
    return kind(**config).eval().requires_grad_(False)


def pipeline(name, scheduler, transformer, vae=None, **others):
    """A pipeline of diffusers whose other components are left out."""
    pipe = getattr(diffusers, name)(
        scheduler=scheduler, transformer=transformer, vae=vae, text_encoder=None, tokenizer=None, **others
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_vae(channels=4):
    return random(
        AutoencoderKL,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.1,
    )


_SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": TEXT,
    "caption_projection_dim": 16,
    "pooled_projection_dim": TEXT,
    "pos_embed_max_size": 16,
}


def sd3(name="StableDiffusion3Pipeline", scheduler=None, **arguments):
    none = {"text_encoder_2": None, "tokenizer_2": None, "text_encoder_3": None, "tokenizer_3": None}
    if "ControlNet" in name:
        none["controlnet"] = random(SD3ControlNetModel, **_SD3, pos_embed_type="sincos")
    channels = 16 if "Inpaint" in name else 4  # which pipeline takes no other number
    transformer = random(SD3Transformer2DModel, **{**_SD3, "in_channels": channels, "out_channels": channels})
    pipe = pipeline(name, scheduler, transformer, tiny_vae(channels), **none)
    pooled = {"pooled_prompt_embeds": embeds(1, TEXT), "negative_pooled_prompt_embeds": embeds(1, TEXT, seed=1)}
    return Built(pipe, {**texts(), **pooled, "guidance_scale": 3.0, "height": 32, "width": 32, **arguments})


def sd3_image_to_image(scheduler):
    return sd3("StableDiffusion3Img2ImgPipeline", scheduler, image=picture(), strength=0.7)


def sd3_inpainting(scheduler):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    return sd3("StableDiffusion3InpaintPipeline", scheduler, image=picture(), mask_image=mask, strength=0.7)


def sd3_controlnet(scheduler):
    return sd3("StableDiffusion3ControlNetPipeline", scheduler, control_image=picture())


def flux(scheduler, name="FluxPipeline", **arguments):
    transformer = random(
        FluxTransformer2DModel,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    none = {"text_encoder_2": None, "tokenizer_2": None}
    pipe = pipeline(name, scheduler, transformer, tiny_vae() if arguments else None, **none)
    given = {"prompt_embeds": embeds(1, 5, TEXT), "pooled_prompt_embeds": embeds(1, TEXT)}
    size = 32 if arguments else 64
    return Built(
        pipe,
        {**given, "guidance_scale": 3.5, "height": size, "width": size, "output_type": "latent", **arguments},
        told=lambda sigma: sigma,
    )


def flux_image_to_image(scheduler):
    return flux(scheduler, "FluxImg2ImgPipeline", image=picture(), strength=0.7)


def qwen_image(scheduler):
    transformer = random(
        QwenImageTransformer2DModel,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )
    arguments = {
        **texts(("prompt_embeds_mask", "negative_prompt_embeds_mask")),
        "true_cfg_scale": 3.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    pipe = pipeline("QwenImagePipeline", scheduler, transformer)
    return Built(pipe, arguments, told=lambda sigma: sigma, calls_a_step=2)


def z_image(scheduler):
    transformer = random(
        ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )
    arguments = {
        "prompt_embeds": [embeds(5, TEXT)],
        "negative_prompt_embeds": [embeds(3, TEXT, seed=1)],
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    return Built(pipeline("ZImagePipeline", scheduler, transformer), arguments, told=lambda sigma: 1 - sigma)


def sana(scheduler):
    transformer = random(
        SanaTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=8,
    )
    arguments = {
        **texts(_ATTENTION_MASKS),
        "negative_prompt": None,
        "guidance_scale": 3.0,
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return Built(pipeline("SanaPipeline", scheduler, transformer), arguments)


def wan(scheduler):
    transformer = random(
        WanTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    arguments = {
        **texts(),
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "output_type": "latent",
    }
    return Built(pipeline("WanPipeline", scheduler, transformer), arguments, calls_a_step=2)


def ltx(scheduler):
    transformer = random(
        LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=TEXT,
    )
    arguments = {
        **texts(_ATTENTION_MASKS),
        "guidance_scale": 3.0,
        "height": 64,
        "width": 64,
        "num_frames": 9,
        "output_type": "latent",
    }
    return Built(pipeline("LTXPipeline", scheduler, transformer), arguments)


#: The name of a row in docs/pipelines.md -> how the pipeline is built around a scheduler.
FLOW: dict[str, Callable[[Any], Built]] = {
    "sd3-text-to-image": lambda scheduler: sd3(scheduler=scheduler),
    "sd3-img2img": sd3_image_to_image,
    "sd3-inpaint": sd3_inpainting,
    "sd3-controlnet": sd3_controlnet,
    "flux-text-to-image": flux,
    "flux-img2img": flux_image_to_image,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "sana": sana,
    "wan-text-to-video": wan,
    "ltx-text-to-video": ltx,
}
