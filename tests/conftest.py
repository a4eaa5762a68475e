"""Fixtures shared by all tests: a tiny but real diffusers pipeline with random weights, and its text embeddings."""

import os
import signal

# Here and in every process that a test starts: sums depend on the number of threads in their last bits, and networks
# as small as these are faster with one.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

# A shell that starts a job in the background has it ignore SIGINT, and all that it starts; tests send it to both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

EMBEDDING = 16
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_components():
    """UNet and VAE of a few thousand random weights; pipelines are built around them at no cost."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=EMBEDDING,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    return unet.eval().requires_grad_(False), vae.eval().requires_grad_(False)


@pytest.fixture
def tiny_pipeline(tiny_components):
    """A StableDiffusionPipeline with a stock scheduler; prompts are passed as embeddings."""
    unet, vae = tiny_components
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def embeddings():
    """Keyword arguments for two prompts and their negatives, (2, 5, 16) each."""
    generator = torch.Generator().manual_seed(1)
    prompt, negative = (torch.randn(2, 5, EMBEDDING, generator=generator) for _ in range(2))
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative}
