"""A real Stable Diffusion pipeline in a few megabytes, trained on pixel-art avatars: for demos and tests."""

import functools
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import torch

#: guidance at which the miniature's base pipeline looks best (highest attribute accuracy at 100 steps)
MINIATURE_GUIDANCE = 7.5
#: the same of its flow-matching pipeline
MINIATURE_FLOW_GUIDANCE = 5.0
#: the embedded checkpoints: the base, and the base's UNet fine-tuned as people fine-tune theirs
MINIATURE_CHECKPOINTS = ("avatars", "disco")
#: and the flow-matching base, a pipeline of another class on the same autoencoder and the same pictures
MINIATURE_FLOW = "flow"
#: the parts of its pipeline that it does without, which diffusers wants to be told
MINIATURE_FLOW_LEFT_OUT = ("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor")


#: words that say nothing by themselves: not learnt, and not worth a remark
_LITTLE = frozenset(
    ["an", "the", "in", "of", "is", "has", "who", "wearing", "their", "his", "her", "this", "portrait"]
)


def miniature_folder() -> Path:
    """Folder of the embedded weights, laid out as diffusers saves them."""
    return Path(str(files(__package__) / "assets"))


def load_miniature(checkpoint: str = "avatars", dtype: torch.dtype = torch.float32):
    """An embedded pipeline: 32 x 32 pictures, 4 x 8 x 8 latents.

    Args:
        checkpoint: "avatars", the base, a `StableDiffusionPipeline` with epsilon prediction and DDIM; "disco", its
            UNet fine-tuned on avatars of another taste; or "flow", a `StableDiffusion3Pipeline` with a transformer
            trained by flow matching on the avatars.
        dtype: dtype of the weights, which are stored in fp16.

    Raises:
        ValueError: unknown checkpoint; a dtype that is none of torch's.
    """
    if checkpoint != MINIATURE_FLOW:
        _check(checkpoint)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype={dtype!r}` is no dtype of torch's. Pass torch.float16, torch.float32 or another.")
    with _silence():
        from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

        folder, home, replaced = miniature_folder(), "avatars", {}
        if checkpoint == MINIATURE_FLOW:
            home = checkpoint
            replaced.update(dict.fromkeys(MINIATURE_FLOW_LEFT_OUT))
            vae = folder / "avatars" / "vae"
            replaced["vae"] = AutoencoderKL.from_pretrained(vae, dtype=dtype, shift_factor=0.0)
        elif checkpoint != "avatars":
            replaced["unet"] = UNet2DConditionModel.from_pretrained(folder / checkpoint / "unet", dtype=dtype)
        pipe = DiffusionPipeline.from_pretrained(folder / home, dtype=dtype, **replaced)
    pipe.set_progress_bar_config(disable=None)  # a bar for people, none in pipes and logs
    return pipe


@contextmanager
def _silence() -> Iterator[None]:
    """No bars for 14 MB, and no lines about what transformers misses but the miniature does not need."""
    import transformers
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    level = transformers.logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled(), diffusers_logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars[0]:
            transformers_logging.enable_progress_bar()
        if bars[1]:
            diffusers_logging.enable_progress_bar()


def miniature_prompts(n: int, seed: int = 0, checkpoint: str = "avatars") -> list[str]:
    """`n` different prompts of the held-out pictures, which no training has seen, drawn with `seed`.

    Raises:
        ValueError: `n` below 1 or above the number of held-out prompts; unknown checkpoint.
    """
    _check(checkpoint)
    if isinstance(n, bool) or not isinstance(n, int):
        raise ValueError(f"`n={n!r}` is no number of prompts. Pass an integer: `miniature_prompts(4)`.")
    prompts = list(dict.fromkeys(json.loads((miniature_folder() / "prompts.json").read_text())[checkpoint]))
    if not 1 <= n <= len(prompts):
        raise ValueError(f"`n={n}` prompts were asked for; there are 1 to {len(prompts)} for {checkpoint!r}.")
    return random.Random(seed).sample(prompts, n)


def unknown_words(prompt: str, checkpoint: str = "avatars") -> list[str]:
    """The words of a prompt that no picture of the checkpoint's training was described with, in their order.

    The miniature draws on as if they were not there. Articles and their like are not named.

    Raises:
        ValueError: unknown checkpoint.
    """
    _check(checkpoint)
    words = re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+", prompt.lower())
    known = _vocabulary(checkpoint) | _LITTLE
    return list(dict.fromkeys(word for word in words if word not in known))


def unknown_words_sentence(prompt: str, checkpoint: str = "avatars") -> str:
    """A sentence that names a prompt's unknown words and says what the checkpoint knows; "" if there are none."""
    words = unknown_words(prompt, checkpoint)
    if not words:
        return ""
    named = ", ".join(f'"{word[:20]}"' for word in words[:6]) + (" ..." if len(words) > 6 else "")
    known = "hair, skin, hat, glasses, beard, clothes, background, colours, happy, sad"
    are = "is" if len(words) == 1 else "are"
    return f"{named} {are} unknown to the {checkpoint}, who draw on without. They know a person with {known}."


@functools.cache
def _vocabulary(checkpoint: str) -> frozenset[str]:
    prompts = json.loads((miniature_folder() / "prompts.json").read_text())[checkpoint]
    return frozenset(word for prompt in prompts for word in re.findall(r"[a-z]+", prompt))


def _check(checkpoint: str) -> None:
    if checkpoint not in MINIATURE_CHECKPOINTS:
        raise ValueError(f"`checkpoint={checkpoint!r}` is not one of {', '.join(MINIATURE_CHECKPOINTS)}.")
