"""What flow-matching pipelines of diffusers are built of, tiny and random; prompts are embeddings.

Results are latents where nothing has to be encoded: encoders are left out.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from PIL import Image

TEXT = 16
ATTENTION_MASKS = ("prompt_attention_mask", "negative_prompt_attention_mask")

#: What the transformers of a family share: those with double and single streams, and those of films in Wan's layout.
STREAMS = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
}
FILMS = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


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
    kind = getattr(diffusers, name)
    asked = {k for k, p in inspect.signature(kind).parameters.items() if p.default is inspect.Parameter.empty}
    given = {"scheduler": scheduler, "transformer": transformer, "vae": vae, **others}
    pipe = kind(**{**dict.fromkeys(asked), **given})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def left_half():
    """The mask of a picture's left half."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    return mask


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


def tiny_video_vae(kind=AutoencoderKLWan):
    """The autoencoder of Wan or Qwen-Image: eight pixels a latent, four frames a latent frame."""
    return random(
        kind,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.1, 0.9, 1.2],
    )
