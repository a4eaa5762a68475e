"""Captions and pictures as the network knows them, and back: here alone text encoders and autoencoder are called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perflow_diffusers.families import network_in
from perflow_diffusers.words.shown import shown
from perflow_training.errors import ConfigError
from perflow_training.teacher.conditions import Conditions, Rows, Sizes, time_ids

Encoded = dict[str, Tensor]
#: A diffusers pipeline: what it holds is known only when it runs.
Pipeline = Any
#: keys of an autoencoder's config that say how latents follow from its posterior
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@shown
@dataclass(frozen=True)
class Encoders:
    """What turns captions and pictures into tensors, one row each; for a cache, which has no pipeline, too.

    `encode_prompts`: N captions -> `prompt_embeds` (N, L, D) and, for SDXL, `pooled` (N, P). `encode_images`: (N, 3,
    H, W) in -1..1 -> `latents_mean` and `latents_std` (N, C, h, w) of the autoencoder's posterior, as it gives them.
    `empty_prompt`: the same as `encode_prompts`, one row, for what guidance and caption dropout use. `scaling` says
    how latents follow from a draw of the posterior (see `to_latents`). `model` tells caches of different models apart.
    """

    model: str
    encode_prompts: Callable[[list[str]], Encoded]
    encode_images: Callable[[Tensor], Encoded]
    empty_prompt: Callable[[], Encoded]
    scaling: Mapping[str, Any]


def pipeline_encoders(pipe: Pipeline, model: str = "", device: torch.device | str | None = None) -> Encoders:
    """Encoders of a Stable Diffusion 1, 2 or XL pipeline, by its own `encode_prompt` and `vae`."""
    place = torch.device(device or pipe.device)

    @torch.no_grad()
    def encode(prompt: str | list[str], empty: bool) -> Encoded:
        encoded = pipe.encode_prompt(
            prompt=prompt, device=place, num_images_per_prompt=1, do_classifier_free_guidance=empty
        )
        # (prompt, empty prompt, pooled prompt, pooled empty prompt), of which only SDXL has the last two
        embeds, pooled = encoded[empty], encoded[2 + empty] if len(encoded) == 4 else None
        if pooled is None and _wants_pooled(pipe):
            raise ConfigError(f"{type(pipe).__name__} gives no pooled embeddings, but its UNet wants them.")
        return {"prompt_embeds": embeds} if pooled is None else {"prompt_embeds": embeds, "pooled": pooled}

    @torch.no_grad()
    def images(pixels: Tensor) -> Encoded:
        posterior = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
        return {"latents_mean": posterior.mean, "latents_std": posterior.std}

    def prompts(captions: list[str]) -> Encoded:
        return encode(captions, False)

    def empty() -> Encoded:
        """What the pipeline itself takes where no negative prompt is given (zeros for SDXL base)."""
        return encode("", True)

    config = pipe.vae.config if pipe.vae is not None else {}
    scaling = {key: config[key] for key in SCALING if config.get(key) is not None}
    return Encoders(model, prompts, images, empty, scaling)


def conditions_of(encoded: Mapping[str, Tensor], sizes: Sequence[Sizes]) -> Conditions:
    """Conditions of encoded captions; `sizes`, one a caption, is what SDXL is told of the pictures."""
    return encoded_rows(encoded["prompt_embeds"], encoded.get("pooled"), time_ids(sizes))


def encoded_rows(prompt_embeds: Tensor, pooled: Tensor | None = None, ids: Tensor | None = None) -> Conditions:
    """What a UNet is told of captions: embeddings (B, L, D); some also `pooled` (B, P) and sizes, `ids` (B, 6)."""
    rows: dict[str, Rows] = {"encoder_hidden_states": prompt_embeds}
    if pooled is not None:
        rows["added_cond_kwargs.text_embeds"] = pooled
        if ids is not None:
            rows["added_cond_kwargs.time_ids"] = ids.to(pooled.device)
    return Conditions(rows)


def encode_prompts(
    pipe: Pipeline,
    prompts: Sequence[str],
    sizes: Sequence[Sizes] | None = None,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Conditions:
    """Conditions of N prompts through the pipeline's own `encode_prompt`.

    `sizes`: (original size, top left of the crop, target size) a prompt, each (height, width) or (top, left), which
    SDXL is told; by default those of an uncropped picture of the pipeline's own size.
    """
    encoders = pipeline_encoders(pipe, device=device)
    sizes = [uncropped(pipe)] * len(prompts) if sizes is None else sizes
    starts = range(0, len(prompts), batch_size)
    parts = [encoders.encode_prompts(list(prompts[first : first + batch_size])) for first in starts]
    return Conditions.cat(
        [conditions_of(part, sizes[first : first + batch_size]) for first, part in zip(starts, parts, strict=True)]
    )


def encode_empty(pipe: Pipeline, device: torch.device | str | None = None) -> Conditions:
    """One row: what the pipeline itself uses where no negative prompt is given (zeros for SDXL base)."""
    encoded = pipeline_encoders(pipe, device=device).empty_prompt()
    return encoded_rows(encoded["prompt_embeds"], encoded.get("pooled"))


def encode_images(pipe: Pipeline, images: Tensor, noise: Tensor, batch_size: int = 16) -> Tensor:
    """Scaled latents (N, C, h, w) of images (N, 3, H, W) in -1..1; `noise` (N, C, h, w) draws from the posterior."""
    encoders, vae = pipeline_encoders(pipe), pipe.vae
    latents = []
    for part, eps in zip(images.split(batch_size), noise.split(batch_size), strict=True):
        posterior = encoders.encode_images(part)
        drawn = posterior["latents_mean"] + posterior["latents_std"] * eps.to(vae.device, vae.dtype)
        latents.append(drawn.float())
    return to_latents(torch.cat(latents), encoders.scaling)


def to_latents(posterior: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Latents as the network knows them from draws (N, C, h, w) of the posterior.

    `scaling` has the keys of the autoencoder's config: `scaling_factor`, `shift_factor`, `latents_mean` and
    `latents_std` (numbers by channel), of which only the first must be there.
    """
    factor, shift = scaling["scaling_factor"], scaling.get("shift_factor") or 0.0
    if (channels := _by_channel(scaling, posterior)) is None:
        return (posterior - shift) * factor
    mean, std = channels
    return (posterior - mean) * (factor / std)


@torch.no_grad()
def decode_latents(pipe: Pipeline, latents: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) in -1..1 of scaled latents (N, C, h, w), in the VAE's dtype."""
    vae = pipe.vae
    z = latents.to(vae.device, torch.float32) / vae.config.scaling_factor
    channels = _by_channel(vae.config, z)
    z = z + (vae.config.get("shift_factor") or 0.0) if channels is None else z * channels[1] + channels[0]
    return vae.decode(z.to(vae.dtype), return_dict=False)[0]


def _by_channel(scaling: Mapping[str, Any], z: Tensor) -> tuple[Tensor, Tensor] | None:
    """(mean, standard deviation) beside z, of an autoencoder that has them by channel; None for others."""
    given = [scaling.get(name) for name in ("latents_mean", "latents_std")]
    if any(numbers is None for numbers in given):
        return None
    mean, std = (torch.tensor(numbers, device=z.device).view(1, -1, 1, 1) for numbers in given)
    return mean, std


def _wants_pooled(pipe: Pipeline) -> bool:
    """Whether the network wants pooled embeddings and picture sizes beside the prompt."""
    network = network_in(pipe)  # none where a cache is made
    return network is not None and network.config.get("addition_embed_type") == "text_time"


def latent_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the latents that a network's config names as its own."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def picture_size(pipe: Pipeline, config: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """(height, width) of the pictures that the pipeline draws by default; `config` of a network that it lacks."""
    height, width = latent_size(network_in(pipe).config if config is None else config)
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def uncropped(pipe: Pipeline) -> Sizes:
    """What SDXL is told of a picture of the pipeline's own size."""
    full = picture_size(pipe)
    return full, (0, 0), full
