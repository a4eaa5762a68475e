"""Original-format checkpoints, and files of their UNet alone, as UNet weights, through diffusers."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from perflow_diffusers.errors import DeltaError
from perflow_diffusers.families import FAMILIES, TEXT_LAYERS
from perflow_diffusers.weights.read.keys import ORIGINAL_PREFIX
from perflow_diffusers.weights.read.original_file import ema_names, unet_names
from perflow_diffusers.weights.read.source import Renamed, WeightSource, open_weights

logger = logging.get_logger("diffusers.perflow")  # below diffusers' own, so that its verbosity applies

#: Width of the text embedding -> what the UNet's config says beside the defaults of `UNet2DConditionModel`.
UNET_CONFIGS: dict[int, dict[str, Any]] = {one.text_width: dict(one.config) for one in FAMILIES if one.config}

_LAYERS = {"layers_per_block": 2}  # diffusers' converter reads it from the file, where a default does not count
_CONV_IN = ORIGINAL_PREFIX + "input_blocks.0.0.weight"


def unet_of_single_file(source: WeightSource, config: Mapping[str, Any] | None = None) -> WeightSource:
    """The UNet weights of an original-format file under diffusers' names, in the file's dtype.

    Of a checkpoint that has an EMA too those as trained are read, which the log says; `open_weights(file,
    extract_ema=True)` gives the EMA. A file that has only the EMA is read as that.

    The config is that of SD 1.x, SD 2.x or SDXL, told apart by the width of the text embedding (with the checkpoint's
    number of input channels), or `config` if given. For other families diffusers is asked, which may ask the Hub.
    Tensors of a file stay memory-mapped, except where diffusers reshapes or casts them.

    Raises `DeltaError` if diffusers cannot convert it.
    """
    from diffusers import UNet2DConditionModel

    names = _chosen(source)
    config = config or _known_config({name: source.shapes[key] for name, key in names.items()})
    dtype = source.dtypes[next(iter(names.values()))] if names else torch.float32
    try:
        if config is None:
            if not source.files:
                raise DeltaError(
                    f"{source.name} is in the original format: pass its file, which diffusers can convert."
                )
            as_it_is = not isinstance(source.read, Renamed) and all(name == key for name, key in names.items())
            given = str(source.files[0]) if as_it_is else {name: source[key] for name, key in names.items()}
            return open_weights(UNet2DConditionModel.from_single_file(given, dtype=dtype))
        with tempfile.TemporaryDirectory(prefix="perflow-config-") as folder:
            content = {"_class_name": "UNet2DConditionModel", **_LAYERS, **config}
            Path(folder, "config.json").write_text(json.dumps(content), encoding="utf-8")
            checkpoint = {name: source[key] for name, key in names.items()}
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


def _chosen(source: WeightSource) -> dict[str, str]:
    """`{model.diffusion_model...: key}` of the weights that are read, with a word on those that are not."""
    names, means = unet_names(source), ema_names(source)
    if names and means:
        logger.warning(
            f"{source.name} has weights as trained and their EMA; the former are read. The EMA: "
            "`open_weights(file, extract_ema=True)`, on the command line --base-ema or --tuned-ema."
        )
    elif means:
        logger.info(f"{source.name} has only EMA weights, which are read.")
    return names or means


def _known_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The config of a family that is known here."""
    widths = {shape[1] for name, shape in shapes.items() if name.endswith(TEXT_LAYERS) and len(shape) == 2}
    known = UNET_CONFIGS.get(widths.pop()) if len(widths) == 1 else None
    if known is None or _CONV_IN not in shapes:
        return None
    return {**known, "in_channels": shapes[_CONV_IN][1]}
