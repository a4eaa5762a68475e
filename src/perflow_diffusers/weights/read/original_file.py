"""Which tensors of an original-format file are the UNet's, by name: those as trained, or their running mean (EMA).

A checkpoint calls them `model.diffusion_model.input_blocks.0.0.weight`, and their means, without dots,
`model_ema.diffusion_modelinput_blocks00weight`; a file of the UNet alone has a part of the prefix, or none.
"""

import re
from collections.abc import Iterable

from perflow_diffusers.weights.read.keys import EMA_PREFIX, ORIGINAL_PREFIX

_PREFIXES = (ORIGINAL_PREFIX, "diffusion_model.")
_BARE = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.")
# The original UNet's own words, the longer of two that begin alike first.
_PLACE = re.compile(r"(input_blocks|output_blocks|label_emb)(\d+)(\d)(?=\D)")
_WORD = re.compile(
    r"time_embed|label_emb|middle_block|in_layers|out_layers|emb_layers|skip_connection|transformer_blocks|norm[123]?"
    r"|proj_in|proj_out|proj|attn[12]|to_[qkv]|to_out|out|ff|net|op|conv|weight|bias|\d+"
)


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """`{model.diffusion_model...: name}` of the UNet's weights as trained; {} if there are none."""
    names = list(names)
    for prefix in _PREFIXES:
        found = {ORIGINAL_PREFIX + name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
        if found:
            return found
    return {ORIGINAL_PREFIX + name: name for name in names if _BARE.match(name)}


def ema_names(names: Iterable[str]) -> dict[str, str]:
    """`{model.diffusion_model...: name}` of the EMA of the UNet's weights; {} if there are none.

    A name of words that no UNet of Stable Diffusion has comes back as it is.
    """
    return {
        ORIGINAL_PREFIX + _dotted(name.removeprefix(EMA_PREFIX).removeprefix(".")): name
        for name in names
        if name.startswith(EMA_PREFIX)
    }


def _dotted(flat: str) -> str:
    """`input_blocks101in_layers0weight` -> `input_blocks.10.1.in_layers.0.weight`."""
    place = _PLACE.match(flat)
    parts = list(place.groups()) if place else []
    at = place.end() if place else 0
    while at < len(flat):
        word = _WORD.match(flat, at)
        if word is None:
            return flat
        parts.append(word[0])
        at = word.end()
    return ".".join(parts)
