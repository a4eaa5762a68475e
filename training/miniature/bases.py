"""What the miniature's two bases are made of and how each is trained: a diffusion as SD 1.5, a flow as SD 3.

Both draw on the same autoencoder, captions and pictures; `train_base.py` trains either.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from perflow_diffusers.miniature import MINIATURE_FLOW_LEFT_OUT
from pictures import load_pictures
from text import learn_tokenizer, new_text_encoder

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 80),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 96,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
#: Stable Diffusion 1.5's noise schedule
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SNR_GAMMA = 5.0  # min-SNR weighting (Hang et al. 2023, eq. 9)

TEXT_WIDTHS = (96, 32)  # of the two text encoders, whose tokens are put side by side
TRANSFORMER = {
    "sample_size": 8,
    "patch_size": 1,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 5,
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "joint_attention_dim": sum(TEXT_WIDTHS),
    "caption_projection_dim": 96,
    "pooled_projection_dim": sum(TEXT_WIDTHS),
    "pos_embed_max_size": 8,
}
SHIFT = 2.0  # of the time that the pipeline samples in
T5_TOKENS = 256  # zeros that the pipeline puts where the third text encoder, which is left out, would stand


def new_tokenizer() -> CLIPTokenizer:
    """The words of both styles' captions."""
    return learn_tokenizer(
        [text for style in ("avatars", "thumbs") for text in load_pictures(style, "train").redraw_captions(0)]
    )


class Diffusion:
    """Stable Diffusion's: a UNet that predicts epsilon, min-SNR weighted."""

    pipeline, network = StableDiffusionPipeline, "unet"
    texts: tuple[str, ...] = ("text_encoder",)
    left_out: tuple[str, ...] = ()

    @staticmethod
    def new(vae_folder: Path) -> StableDiffusionPipeline:
        """Pipeline with a trained autoencoder and random text encoder and UNet."""
        tokenizer = new_tokenizer()
        return StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(vae_folder),
            text_encoder=new_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(**UNET),
            scheduler=DDIMScheduler(**NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        snr = compute_snr(pipe.scheduler, torch.arange(1000))
        self.weight = (snr.clamp(max=SNR_GAMMA) / snr).float()
        pipe.unet.to(memory_format=torch.channels_last)

    def loss(self, unet: Any, latents: Tensor, ids: Tensor) -> Tensor:
        """Mean over latents (B, 4, 8, 8) with token ids (B, L)."""
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        noisy = self.pipe.scheduler.add_noise(latents, noise, timesteps).contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, timesteps, self.pipe.text_encoder(ids)[0]).sample
        return (self.weight[timesteps] * (predicted.float() - noise).pow(2).mean((1, 2, 3))).mean()

    def finish(self) -> None:
        """The UNet as it is saved."""
        self.pipe.unet.to(memory_format=torch.contiguous_format)


class Flow:
    """Stable Diffusion 3's: a transformer that predicts noise - data on the straight path between them."""

    pipeline, network = StableDiffusion3Pipeline, "transformer"
    texts: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    left_out = MINIATURE_FLOW_LEFT_OUT

    @staticmethod
    def new(vae_folder: Path) -> StableDiffusion3Pipeline:
        """Pipeline with a trained autoencoder, two random text encoders, none in T5's place, a random transformer."""
        tokenizer = new_tokenizer()
        first, second = (
            CLIPTextModelWithProjection(new_text_encoder(tokenizer, width).config) for width in TEXT_WIDTHS
        )
        return StableDiffusion3Pipeline(
            vae=AutoencoderKL.from_pretrained(vae_folder, shift_factor=0.0),
            text_encoder=first,
            tokenizer=tokenizer,
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
            transformer=SD3Transformer2DModel(**TRANSFORMER),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        )

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.stock = pipe.transformer.attn_processors
        pipe.transformer.set_attn_processor(EqualTokens(T5_TOKENS))

    def loss(self, transformer: Any, latents: Tensor, ids: Tensor) -> Tensor:
        """Mean over latents (B, 4, 8, 8) with token ids (B, L).

        Half of the times are logit-normal (Esser et al. 2024, section 3.1), half uniform.
        """
        batch = len(latents)
        noise, even = torch.randn_like(latents), torch.rand(batch)
        sigma = torch.where(torch.arange(batch) % 2 == 0, torch.randn(batch).sigmoid(), even)
        share = sigma[:, None, None, None]
        tokens, pooled = self.encoded(ids)
        predicted = transformer(
            hidden_states=(1 - share) * latents + share * noise,
            timestep=1000 * sigma,
            encoder_hidden_states=pad(tokens, (0, 0, 0, 1)),  # one of the T5's zeros stands for all
            pooled_projections=pooled,
        ).sample
        return (predicted.float() - (noise - latents)).pow(2).mean()

    def encoded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L, D) and pooled (B, D), as the pipeline puts those of both text encoders side by side."""
        outputs = [getattr(self.pipe, name)(ids, output_hidden_states=True) for name in self.texts]
        tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return tokens, torch.cat([output[0] for output in outputs], dim=-1)

    def finish(self) -> None:
        """The network as the pipeline calls it, with all of the T5's zeros."""
        self.pipe.transformer.set_attn_processor(self.stock)


class EqualTokens:
    """SD 3's joint attention in which the last text token stands for `count` equal ones.

    Text has no positions there, so equal tokens stay equal through all layers: that many keys of one value are one
    key whose weight is `count` times as large, its logit larger by log(count). Exact, and a third of the tokens.
    """

    def __init__(self, count: int) -> None:
        self.bias = math.log(count)

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **unused: Any
    ) -> tuple[Tensor, Tensor]:
        """Pictures' tokens (B, N, D) and texts' (B, M, D), attended to as one sequence."""
        length = hidden_states.shape[1]
        pictures = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        texts = (layer(encoder_hidden_states) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        query, key, value = (
            torch.cat(pair, dim=1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for pair in zip(pictures, texts, strict=True)
        )
        mask = query.new_zeros(key.shape[2])
        mask[-1] = self.bias
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask.expand(query.shape[2], -1))
        out = out.transpose(1, 2).flatten(2)
        text = out[:, length:]
        return attn.to_out[0](out[:, :length]), text if attn.context_pre_only else attn.to_add_out(text)


BASES: dict[str, type[Diffusion] | type[Flow]] = {"diffusion": Diffusion, "flow": Flow}
