"""Original-format checkpoints (one file for all, `model.diffusion_model...`) as UNet weights, through diffusers."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.weights import keys
from perflow_diffusers.weights.errors import DeltaError
from perflow_diffusers.weights.source import WeightSource, open_weights

_SD1: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
_SD2: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
#: Width of the text embedding -> what the UNet's config says beside the defaults of `UNet2DConditionModel`.
UNET_CONFIGS: dict[int, dict[str, Any]] = {768: _SD1, 1024: _SD2, 2048: _SDXL}

_LAYERS = {"layers_per_block": 2}  # diffusers' converter reads it from the file, where a default does not count
_CONV_IN = keys.ORIGINAL_PREFIX + "input_blocks.0.0.weight"
_TEXT = ".transformer_blocks.0.attn2.to_k.weight"


def unet_of_single_file(source: WeightSource, config: Mapping[str, Any] | None = None) -> WeightSource:
    """The UNet weights of an original-format checkpoint under diffusers' names, in the checkpoint's dtype.

    The config is that of SD 1.x, SD 2.x or SDXL, told apart by the width of the text embedding (with the checkpoint's
    number of input channels), or `config` if given. For other families diffusers is asked, which may ask the Hub.
    Tensors of a file stay memory-mapped, except where diffusers reshapes or casts them.

    Raises `DeltaError` if diffusers cannot convert it.
    """
    from diffusers import UNet2DConditionModel

    config = config or _known_config(source)
    dtype = next((source.dtypes[name] for name in source if name.startswith(keys.ORIGINAL_PREFIX)), torch.float32)
    try:
        if config is None:
            if not source.files:
                raise DeltaError(
                    f"{source.name} is in the original format: pass its file, which diffusers can convert."
                )
            return open_weights(UNet2DConditionModel.from_single_file(str(source.files[0]), dtype=dtype))
        with tempfile.TemporaryDirectory(prefix="perflow-config-") as folder:
            content = {"_class_name": "UNet2DConditionModel", **_LAYERS, **config}
            Path(folder, "config.json").write_text(json.dumps(content), encoding="utf-8")
            checkpoint = {name: source[name] for name in source if name.startswith(keys.ORIGINAL_PREFIX)}
            unet = UNet2DConditionModel.from_single_file(checkpoint, config=folder, dtype=dtype)
    except DeltaError:
        raise
    except Exception as error:
        reason = "weights of the UNet are missing" if isinstance(error, NotImplementedError) else error
        raise DeltaError(
            f"diffusers could not convert {source.name} from the original format ({reason}). Convert it once with "
            "`StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)`, and pass the folder."
        ) from error
    return open_weights(unet)


def _known_config(source: WeightSource) -> dict[str, Any] | None:
    """The config of a family that is known here."""
    widths = {source.shapes[name][1] for name in source if name.endswith(_TEXT) and len(source.shapes[name]) == 2}
    known = UNET_CONFIGS.get(widths.pop()) if len(widths) == 1 else None
    if known is None or _CONV_IN not in source:
        return None
    return {**known, "in_channels": source.shapes[_CONV_IN][1]}
