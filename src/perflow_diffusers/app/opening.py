"""A user's own model and accelerator as a studio: device and dtype chosen, errors in words."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perflow_diffusers.app.studio import Studio
from perflow_diffusers.io.names import Where, pasted
from perflow_diffusers.io.repository import reached
from perflow_diffusers.weights import WeightSourceError, open_weights
from perflow_diffusers.weights.read.locate import is_local

OFFLOADS = ("model", "sequential")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class OpeningError(ValueError):
    """A model or accelerator that cannot be opened; says what to do."""


def open_studio(
    model: str,
    accelerator: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Studio:
    """Load a pipeline (a folder, a Hub id or an original-format .safetensors file) and its accelerator.

    `accelerator`: what `load_perflow` takes; None for a pipeline that has PeRFlow in its weights. `device`: "cuda",
    "mps" or "cpu", by default the first that is there; `dtype`: "float16", "bfloat16" or "float32", by default float16
    on cuda and mps and float32 on cpu. `offload`: "model" or "sequential", for a GPU that is too small for all at
    once. The safety checker is the checkpoint's own. `progress` is told in words what is being done.

    Raises OpeningError, and the library's ValueErrors, for what cannot be opened.
    """
    tell = progress or (lambda what: None)
    if model in ("miniature", "avatars", "disco"):
        tell("Loading the miniature")
        return Studio.miniature("avatars" if model == "miniature" else model)
    model = _repository(model)
    chosen = _device(device)
    if offload is not None and offload not in OFFLOADS:
        raise OpeningError(f"`offload={offload!r}` is unknown. Choose one of {', '.join(OFFLOADS)}.")
    if offload and chosen == "cpu":
        raise OpeningError("Offloading moves parts of a pipeline to a GPU when needed; here is none. Leave it out.")
    if dtype is not None and dtype not in DTYPES:
        raise OpeningError(f"`dtype={dtype!r}` is unknown. Choose one of {', '.join(DTYPES)}.")
    kind = DTYPES[dtype] if dtype else torch.float32 if chosen == "cpu" else torch.float16
    tell(f"Loading {Path(model).name} ({str(kind).removeprefix('torch.')}, {chosen})")
    pipe = _load(model, kind)
    if not hasattr(pipe, "unet"):
        raise OpeningError(
            f"{model} is a {type(pipe).__name__}, which has no UNet. Take a Stable Diffusion 1.x, 2.x or XL model."
        )
    tell(f"Loading the accelerator {Path(accelerator).name}" if accelerator else "Looking for its accelerator")
    # before anything moves: the accelerator's checks are quick, a model's way to the device is not
    try:
        studio = Studio.around(pipe, accelerator or "", model)
    except ValueError as error:
        if accelerator:
            raise
        raise OpeningError(f"Name an accelerator for {model}, with --accelerator. ({error})") from None
    studio.offload, studio.device = offload, chosen
    if offload == "model":
        pipe.enable_model_cpu_offload(device=chosen)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=chosen)
    else:
        tell(f"Moving it to {chosen}")
        pipe.to(chosen)
    return studio


def _device(device: str | None) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return next(name for name, found in there.items() if found)
    if not there.get(device.partition(":")[0], False):
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise OpeningError(f"The device {device!r} is not there. Choose from: {found}.")
    return device


def _repository(model: str) -> str:
    """The Hub id in an address that was copied out of a browser; any other name as it is."""
    if Path(model).expanduser().exists():
        return model
    repo_id, where = pasted(model, Where())
    if where.subfolder or where.variant or where.revision not in (None, "main"):
        revision = f" --revision {where.revision}" if where.revision not in (None, "main") else ""
        raise OpeningError(
            f"{model} is a part or a revision of {repo_id}, and pipelines are drawn with as a whole, from the main "
            f"branch. For others: `hf download {repo_id}{revision} --local-dir FOLDER`, and pass that folder."
        )
    return repo_id


def _load(model: str, dtype: torch.dtype) -> Any:
    import diffusers

    path = Path(model).expanduser()
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise OpeningError(f"{path.name} may be a pickle, which can run code. Take a .safetensors file.")
    if path.suffix.lower() == ".safetensors":
        if not path.is_file():
            raise OpeningError(f"The file {model} does not exist.")
        return _single_file(path, dtype)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise OpeningError(f"{model} has no model_index.json, so it is no pipeline as diffusers saves them.")
    if not path.exists() and is_local(model):
        raise OpeningError(f"{model} does not exist, and it is no Hub id ('owner/name').")
    # Asked once: diffusers' own asking takes half a minute where there is no network.
    only = not path.exists() and reached(model, Where()).local_files_only
    cls = diffusers.AutoPipelineForText2Image
    source = str(path) if path.exists() else model
    return _told(lambda: cls.from_pretrained(source, dtype=dtype, use_safetensors=True, local_files_only=only), model)


def _single_file(path: Path, dtype: torch.dtype) -> Any:
    """A checkpoint in the original format; its tokenizer and configurations are those of a repository of the Hub."""
    import diffusers
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    try:
        names = open_weights(path)
    except WeightSourceError as error:
        raise OpeningError(f"{path.name} is no whole .safetensors file ({error}).") from None
    is_xl = any(name.startswith("conditioner.embedders.") for name in names)
    cls: Any = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
    config = fetch_diffusers_config(names)["pretrained_model_name_or_path"]
    try:
        only = reached(config, Where()).local_files_only
    except WeightSourceError as error:
        raise OpeningError(f"A single file has no tokenizer; that of {path.name} is elsewhere: {error}") from error
    return _told(lambda: cls.from_single_file(str(path), config=config, dtype=dtype, local_files_only=only), path.name)


def _told(load: Callable[[], Any], model: str) -> Any:
    """Run diffusers' loading, and say its errors in one sentence."""
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        text = " ".join(str(error).split())
        raise OpeningError(f"{model} cannot be loaded: {text[:400]}") from error
