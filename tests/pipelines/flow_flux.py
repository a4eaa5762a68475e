"""Flux, FLUX.2 and their kin around tiny random transformers."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    OvisImageTransformer2DModel,
)
from flow_parts import (
    ATTENTION_MASKS,
    STREAMS,
    TEXT,
    Built,
    embeds,
    left_half,
    picture,
    pipeline,
    random,
    texts,
    tiny_vae,
)


def as_told(sigma):
    return sigma


def flux(scheduler, name="FluxPipeline", channels=16, **arguments):
    transformer = random(
        FluxTransformer2DModel,
        in_channels=channels,
        out_channels=16,
        **STREAMS,
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
        told=as_told,
    )


def flux_image_to_image(scheduler):
    return flux(scheduler, "FluxImg2ImgPipeline", image=picture(), strength=0.7)


def flux_inpainting(scheduler):
    return flux(scheduler, "FluxInpaintPipeline", image=picture(), mask_image=left_half(), strength=0.7)


def flux_kontext(scheduler):
    return flux(scheduler, "FluxKontextPipeline", image=picture(), _auto_resize=False, max_area=32 * 32)


def flux_kontext_inpainting(scheduler):
    given = {"image": picture(), "mask_image": left_half(), "strength": 0.7}
    return flux(scheduler, "FluxKontextInpaintPipeline", **given, _auto_resize=False, max_area=32 * 32)


def flux_fill(scheduler):
    return flux(scheduler, "FluxFillPipeline", channels=48, image=picture(), mask_image=left_half(), strength=1.0)


def flux_control(scheduler):
    return flux(scheduler, "FluxControlPipeline", channels=32, control_image=picture())


def flux_control_image_to_image(scheduler):
    given = {"image": picture(), "control_image": picture(1), "strength": 0.7}
    return flux(scheduler, "FluxControlImg2ImgPipeline", channels=32, **given)


def flux2(scheduler, name="Flux2KleinPipeline", **arguments):
    klein = "Klein" in name
    transformer = random(
        Flux2Transformer2DModel,
        in_channels=16,
        **STREAMS,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=not klein,
    )
    vae = random(
        AutoencoderKLFlux2,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    given = {"prompt_embeds": embeds(1, 5, TEXT), "guidance_scale": 3.0}
    if klein and "KV" not in name:
        given["negative_prompt_embeds"] = embeds(1, 5, TEXT, seed=1)
    if "KV" in name:
        del given["guidance_scale"]
    given = {**given, "height": 32, "width": 32, "output_type": "latent", **arguments}
    pipe = pipeline(name, scheduler, transformer, vae)
    return Built(pipe, given, told=as_told, calls_a_step=2 if "negative_prompt_embeds" in given else 1)


def flux2_dev(scheduler):
    return flux2(scheduler, "Flux2Pipeline")


def flux2_klein_edit(scheduler):
    return flux2(scheduler, image=picture().resize((64, 64)))


def flux2_klein_inpainting(scheduler):
    given = {"image": picture(), "mask_image": left_half(), "strength": 0.7}
    return flux2(scheduler, "Flux2KleinInpaintPipeline", **given)


def flux2_klein_cached(scheduler):
    return flux2(scheduler, "Flux2KleinKVPipeline", image=picture().resize((64, 64)))


def chroma(scheduler, name="ChromaPipeline", **arguments):
    transformer = random(
        ChromaTransformer2DModel,
        in_channels=16,
        **STREAMS,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    size = {"height": 32, "width": 32, "output_type": "latent"}
    masks = dict.fromkeys(ATTENTION_MASKS, torch.ones(1, 5, dtype=torch.bool))
    given = {**texts(), **masks, "guidance_scale": 3.0, **size, **arguments}
    return Built(pipeline(name, scheduler, transformer, tiny_vae()), given, told=as_told, calls_a_step=2)


def chroma_image_to_image(scheduler):
    return chroma(scheduler, "ChromaImg2ImgPipeline", image=picture(), strength=0.7)


def ovis_image(scheduler):
    transformer = random(
        OvisImageTransformer2DModel,
        in_channels=16,
        out_channels=16,
        **STREAMS,
        axes_dims_rope=(4, 6, 6),
    )
    given = {**texts(), "negative_prompt": None, "guidance_scale": 3.0}
    given |= {"height": 64, "width": 64, "output_type": "latent"}
    pipe = pipeline("OvisImagePipeline", scheduler, transformer, tiny_vae())
    return Built(pipe, given, told=as_told, calls_a_step=2)
