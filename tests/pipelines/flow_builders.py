"""Flow-matching pipelines of diffusers around tiny random transformers, each with the arguments of a short call."""

from collections.abc import Callable
from typing import Any

import flow_flux as fx
import flow_more as more
from diffusers import (
    AutoencoderKLQwenImage,
    LTXVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from flow_parts import (
    ATTENTION_MASKS,
    FILMS,
    TEXT,
    Built,
    embeds,
    left_half,
    picture,
    pipeline,
    random,
    texts,
    tiny_vae,
    tiny_video_vae,
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
        masks = int("Inpaint" in name)
        config = {**_SD3, "in_channels": 16 if masks else 4, "extra_conditioning_channels": masks}
        none["controlnet"] = random(SD3ControlNetModel, **config, pos_embed_type="sincos")
    channels = 16 if "Inpaint" in name else 4  # which pipeline takes no other number
    transformer = random(SD3Transformer2DModel, **{**_SD3, "in_channels": channels, "out_channels": channels})
    pipe = pipeline(name, scheduler, transformer, tiny_vae(channels), **none)
    pooled = {"pooled_prompt_embeds": embeds(1, TEXT), "negative_pooled_prompt_embeds": embeds(1, TEXT, seed=1)}
    return Built(pipe, {**texts(), **pooled, "guidance_scale": 3.0, "height": 32, "width": 32, **arguments})


def sd3_image_to_image(scheduler):
    return sd3("StableDiffusion3Img2ImgPipeline", scheduler, image=picture(), strength=0.7)


def sd3_inpainting(scheduler):
    given = {"image": picture(), "mask_image": left_half(), "strength": 0.7}
    return sd3("StableDiffusion3InpaintPipeline", scheduler, **given)


def sd3_pag(scheduler):
    return sd3("StableDiffusion3PAGPipeline", scheduler)


def sd3_pag_image_to_image(scheduler):
    return sd3("StableDiffusion3PAGImg2ImgPipeline", scheduler, image=picture(), strength=0.7)


def sd3_controlnet(scheduler):
    return sd3("StableDiffusion3ControlNetPipeline", scheduler, control_image=picture())


def sd3_controlnet_inpainting(scheduler):
    given = {"control_image": picture(), "control_mask": left_half()}
    return sd3("StableDiffusion3ControlNetInpaintingPipeline", scheduler, **given)


def qwen_image(scheduler, name="QwenImagePipeline", vae=None, **arguments):
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
        **arguments,
    }
    pipe = pipeline(name, scheduler, transformer, vae)
    return Built(pipe, arguments, told=lambda sigma: sigma, calls_a_step=2)


def qwen_kin(name):
    """Another pipeline of Qwen-Image, with a picture."""
    strength = {} if "Edit" in name and "Inpaint" not in name else {"strength": 0.7}
    mask = {"mask_image": left_half()} if "Inpaint" in name else {}
    vae = tiny_video_vae(AutoencoderKLQwenImage)
    return lambda scheduler: qwen_image(scheduler, name, vae, image=picture(), **strength, **mask)


def z_image(scheduler, name="ZImagePipeline", vae=None, **arguments):
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
        **arguments,
    }
    return Built(pipeline(name, scheduler, transformer, vae), arguments, told=lambda sigma: 1 - sigma)


def z_image_image_to_image(scheduler):
    return z_image(scheduler, "ZImageImg2ImgPipeline", tiny_vae(), image=picture().resize((64, 64)), strength=0.7)


def z_image_inpainting(scheduler):
    given = {"image": picture().resize((64, 64)), "mask_image": left_half(), "strength": 0.7}
    return z_image(scheduler, "ZImageInpaintPipeline", tiny_vae(), **given)


def sana(scheduler, name="SanaPipeline"):
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
        **texts(ATTENTION_MASKS),
        "negative_prompt": None,
        "guidance_scale": 3.0,
        "height": 256,
        "width": 256,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return Built(pipeline(name, scheduler, transformer), arguments)


def wan(scheduler, name="WanPipeline", vae=None, channels=4, **arguments):
    transformer = random(
        WanTransformer3DModel,
        in_channels=channels,
        **FILMS,
    )
    arguments = {
        **texts(),
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "output_type": "latent",
        **(arguments or {"num_frames": 5}),
    }
    return Built(pipeline(name, scheduler, transformer, vae), arguments, calls_a_step=2)


def wan_image_to_video(scheduler):
    given = {"image": picture(), "num_frames": 5}
    return wan(scheduler, "WanImageToVideoPipeline", tiny_video_vae(), channels=12, **given)


def wan_video_to_video(scheduler):
    video = [picture(i) for i in range(5)]
    return wan(scheduler, "WanVideoToVideoPipeline", tiny_video_vae(), video=video, strength=0.5)


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
        **texts(ATTENTION_MASKS),
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
    "flux-text-to-image": fx.flux,
    "flux-img2img": fx.flux_image_to_image,
    "qwen-image": qwen_image,
    "z-image": z_image,
    "sana": sana,
    "wan-text-to-video": wan,
    "ltx-text-to-video": ltx,
    "flux2-klein": fx.flux2,
    "flux2-klein-edit": fx.flux2_klein_edit,
    "flux2-klein-inpaint": fx.flux2_klein_inpainting,
    "flux2-dev": fx.flux2_dev,
    "flux-kontext": fx.flux_kontext,
    "flux-kontext-inpaint": fx.flux_kontext_inpainting,
    "flux-fill": fx.flux_fill,
    "flux-inpaint": fx.flux_inpainting,
    "flux-control": fx.flux_control,
    "flux-control-img2img": fx.flux_control_image_to_image,
    "qwen-image-edit": qwen_kin("QwenImageEditPipeline"),
    "qwen-image-img2img": qwen_kin("QwenImageImg2ImgPipeline"),
    "qwen-image-inpaint": qwen_kin("QwenImageInpaintPipeline"),
    "wan-image-to-video": wan_image_to_video,
    "wan-video-to-video": wan_video_to_video,
    "sd3-pag": sd3_pag,
    "sd3-pag-img2img": sd3_pag_image_to_image,
    "sana-pag": lambda scheduler: sana(scheduler, "SanaPAGPipeline"),
    "z-image-img2img": z_image_image_to_image,
    "z-image-inpaint": z_image_inpainting,
    "chroma": fx.chroma,
    "chroma-img2img": fx.chroma_image_to_image,
    "ovis-image": fx.ovis_image,
    "aura-flow": more.aura_flow,
    "lumina2": more.lumina2,
    "cogview4": more.cogview4,
    "prx": more.prx,
    "hidream": more.hidream,
    "hunyuan-video": more.hunyuan_video,
    "skyreels-v2": more.skyreels,
    "flux2-klein-kv": fx.flux2_klein_cached,
    "lumina": more.lumina,
    "sd3-controlnet-inpaint": sd3_controlnet_inpainting,
}
