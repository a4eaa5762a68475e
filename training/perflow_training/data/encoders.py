"""Captions to embeddings and pictures to the autoencoder's posterior, as callables that a cache is made with."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perflow_diffusers.words.shown import shown

Encoded = dict[str, Tensor]


@shown
@dataclass(frozen=True)
class Encoders:
    """What turns examples into tensors, one row an example.

    `encode_prompts`: N captions -> `prompt_embeds` (N, L, D) and, for SDXL, `pooled` (N, P). `encode_images`: (N, 3,
    H, W) in -1..1 -> `latents_mean` and `latents_std` (N, C, h, w) of the autoencoder's posterior, as it gives them.
    `empty_prompt`: the same as `encode_prompts`, one row, for what guidance and caption dropout use. `scaling` says
    how latents follow from a draw of the posterior (see `to_latents`). `model` tells caches of different models apart.
    """

    model: str
    encode_prompts: Callable[[list[str]], Encoded]
    encode_images: Callable[[Tensor], Encoded] | None
    empty_prompt: Callable[[], Encoded]
    scaling: Mapping[str, float | list[float]]


def to_latents(posterior: Tensor, scaling: Mapping[str, float | list[float] | None]) -> Tensor:
    """Latents as the network knows them from draws (N, C, h, w) of the posterior.

    `scaling` has the keys of the autoencoder's config: `scaling_factor`, `shift_factor`, `latents_mean` and
    `latents_std` (numbers by channel), of which only the first must be there.
    """
    mean, std = scaling.get("latents_mean"), scaling.get("latents_std")
    if mean is not None and std is not None:
        shape = (1, -1, 1, 1)
        scale = scaling["scaling_factor"] / torch.tensor(std, device=posterior.device).view(shape)
        return (posterior - torch.tensor(mean, device=posterior.device).view(shape)) * scale
    return (posterior - (scaling.get("shift_factor") or 0.0)) * scaling["scaling_factor"]


def pipeline_encoders(pipe, model: str, device: torch.device | str | None = None) -> Encoders:
    """Encoders of a Stable Diffusion 1, 2 or XL pipeline, by its own `encode_prompt` and `vae`."""
    device = torch.device(device or pipe.device)

    @torch.no_grad()
    def prompts(captions: list[str]) -> Encoded:
        encoded = pipe.encode_prompt(
            prompt=captions, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return _named(encoded[0], encoded[2] if len(encoded) == 4 else None)

    @torch.no_grad()
    def empty() -> Encoded:
        """What the pipeline itself takes where no negative prompt is given (zeros for SDXL base)."""
        encoded = pipe.encode_prompt(
            prompt="", device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return _named(encoded[1], encoded[3] if len(encoded) == 4 else None)

    @torch.no_grad()
    def images(pixels: Tensor) -> Encoded:
        posterior = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist
        return {"latents_mean": posterior.mean, "latents_std": posterior.std}

    keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    scaling = {key: pipe.vae.config[key] for key in keys if pipe.vae.config.get(key) is not None}
    return Encoders(model, prompts, images, empty, scaling)


def _named(embeds: Tensor, pooled: Tensor | None) -> Encoded:
    return {"prompt_embeds": embeds} if pooled is None else {"prompt_embeds": embeds, "pooled": pooled}


def model_identity(name: str, revision: str | None = None) -> str:
    """What tells encoders apart without loading them: a Hub id, or names and contents of a folder's encoder files.

    For a local pipeline the configuration and tokenizer files count with all bytes, and weights with their size and
    first megabyte; where the folder lies does not count.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision}" if revision else name
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    total = hashlib.sha256()
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(1 << 20))
    return f"{folder.resolve().name}#{total.hexdigest()[:16]}"


def same_model(one: str, other: str) -> bool:
    """Whether two identities name the same encoders; the name of a local folder does not matter."""
    return one.rpartition("#")[2] == other.rpartition("#")[2]
