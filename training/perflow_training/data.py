"""Captions and pictures of a training run: a text file, or parquet with `caption` (and `image`) columns."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset

from .backbone import encode_images, encode_prompts
from .config import ConfigError, TrainingConfig


def load_captions(path: str | Path) -> list[str]:
    """One caption a line of a text file, or the `caption` column of a parquet file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"`train_captions={path}` is not a file. Give a text file or a parquet file.")
    if path.suffix != ".parquet":
        captions = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    else:
        table = load_dataset("parquet", data_files=str(path), split="train")
        if "caption" not in table.column_names:
            raise ConfigError(f"{path} has the columns {', '.join(table.column_names)}, and no `caption`.")
        captions = list(table["caption"])
    if not captions:
        raise ConfigError(f"{path} holds no captions.")
    return captions


def load_images(path: str | Path) -> torch.Tensor:
    """(N, 3, H, W) in -1..1 from the `image` column of a parquet file; all pictures have one size."""
    table = load_dataset("parquet", data_files=str(path), split="train")
    images = np.stack([np.asarray(image.convert("RGB")) for image in table["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def condition_sampler(
    pipe, config: TrainingConfig, captions: list[str]
) -> tuple[Callable[[int], torch.Tensor], torch.Tensor, torch.Tensor]:
    """`draw(n)` of prompt embeddings with dropped captions, the embeddings themselves and the empty prompt's."""
    embeddings = encode_prompts(pipe, captions)
    uncond = encode_prompts(pipe, [""])

    def draw(count: int) -> torch.Tensor:
        cond = embeddings[torch.randint(len(embeddings), (count,))]
        dropped = torch.rand(count, 1, 1) < config.caption_dropout
        return torch.where(dropped, uncond, cond)

    return draw, embeddings, uncond


def latent_sampler(pipe, config: TrainingConfig, embeddings: torch.Tensor, uncond: torch.Tensor):
    """`draw(n)` of data latents with their own prompt embeddings; None without `train_images`."""
    if not config.train_images:
        return None
    latents = encode_images(pipe, load_images(config.train_captions))

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randint(len(latents), (count,))
        dropped = torch.rand(count, 1, 1) < config.caption_dropout
        return latents[index], torch.where(dropped, uncond, embeddings[index])

    return draw
