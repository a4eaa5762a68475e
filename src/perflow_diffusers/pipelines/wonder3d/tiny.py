"""A Wonder3D pipeline of a few thousand random weights, for tests and for trying things offline."""

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from .pipeline import Wonder3DPipeline
from .unet import UNetMV2DConditionModel


def tiny_wonder3d(seed: int = 0) -> Wonder3DPipeline:
    """Random weights, drawn with `seed`: 32 x 32 pictures, 4 x 8 x 8 latents, image embeddings of width 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNetMV2DConditionModel(
            sample_size=8,
            in_channels=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=10,
        )
        for name, weight in unet.named_parameters():
            if "attn_joint_mid.to_out" in name:  # it starts at zero, which would join nothing
                torch.nn.init.normal_(weight, std=0.1)
        vae = AutoencoderKL(
            block_out_channels=(4, 4, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        clip = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        )
        encoder = CLIPVisionModelWithProjection(clip)
    return Wonder3DPipeline(
        vae=vae.eval(),
        image_encoder=encoder.eval(),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
