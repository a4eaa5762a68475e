"""Tiny random pipelines of the shapes of SD 1.5 and SDXL."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 16,
    "cross_attention_dim": 24,
    "use_linear_projection": True,
}


def make_unet(kind, seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**_UNET, **(_SDXL if kind == "sdxl" else {})}).eval().requires_grad_(False)


def make_pipe(kind, seed=0, scheduler=None):
    """A pipeline of the shape of SD 1.5 or SDXL with random weights; prompts are passed as embeddings."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    parts = {"vae": vae, "text_encoder": None, "tokenizer": None, "unet": make_unet(kind, seed)}
    if kind == "sdxl":
        own = scheduler or EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **noise)
        pipe = StableDiffusionXLPipeline(text_encoder_2=None, tokenizer_2=None, scheduler=own, **parts)
        pipe.watermark = None
    else:
        own = scheduler or DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **noise)
        pipe = StableDiffusionPipeline(
            scheduler=own, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=4, guidance_scale=2.0):
    """Two small pictures (2, 16, 16, 3) from fixed embeddings and noise."""
    xl = hasattr(pipe, "text_encoder_2")
    width = pipe.unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (torch.randn(2, 5, width, generator=generator) for _ in range(2))
    options = {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
    if xl:
        options["pooled_prompt_embeds"] = options["negative_pooled_prompt_embeds"] = torch.ones(2, 16)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    options.update(latents=latents, height=16, width=16, output_type="np")
    return pipe(num_inference_steps=steps, guidance_scale=guidance_scale, **options).images
