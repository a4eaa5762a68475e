"""A real Stable Diffusion pipeline in a few megabytes, trained on pixel-art avatars: for demos and tests."""

import json
import random
from importlib.resources import files
from pathlib import Path

import torch

#: guidance at which the miniature's base pipeline looks best (highest attribute accuracy at 100 steps)
MINIATURE_GUIDANCE = 7.5
#: the embedded checkpoints: the base, and the base's UNet fine-tuned as people fine-tune theirs
MINIATURE_CHECKPOINTS = ("avatars", "disco")


def miniature_folder() -> Path:
    """Folder of the embedded weights, laid out as diffusers saves them."""
    return Path(str(files(__package__) / "assets"))


def load_miniature(checkpoint: str = "avatars", dtype: torch.dtype = torch.float32):
    """The embedded `StableDiffusionPipeline`: 32 x 32 pictures, 4 x 8 x 8 latents, epsilon prediction, DDIM scheduler.

    Args:
        checkpoint: "avatars" (the base) or "disco" (its UNet fine-tuned on avatars of another taste).
        dtype: dtype of the weights, which are stored in fp16.

    Raises:
        ValueError: unknown checkpoint.
    """
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    _check(checkpoint)
    replaced = {}
    if checkpoint != "avatars":
        replaced["unet"] = UNet2DConditionModel.from_pretrained(miniature_folder() / checkpoint / "unet", dtype=dtype)
    return StableDiffusionPipeline.from_pretrained(miniature_folder() / "avatars", dtype=dtype, **replaced)


def miniature_prompts(n: int, seed: int = 0, checkpoint: str = "avatars") -> list[str]:
    """`n` different prompts of the held-out pictures, which no training has seen, drawn with `seed`.

    Raises:
        ValueError: `n` below 1 or above the number of held-out prompts; unknown checkpoint.
    """
    _check(checkpoint)
    prompts = list(dict.fromkeys(json.loads((miniature_folder() / "prompts.json").read_text())[checkpoint]))
    if not 1 <= n <= len(prompts):
        raise ValueError(f"`n={n}` prompts were asked for; there are 1 to {len(prompts)} for {checkpoint!r}.")
    return random.Random(seed).sample(prompts, n)


def _check(checkpoint: str) -> None:
    if checkpoint not in MINIATURE_CHECKPOINTS:
        raise ValueError(f"`checkpoint={checkpoint!r}` is not one of {', '.join(MINIATURE_CHECKPOINTS)}.")
