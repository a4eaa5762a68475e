"""Find the files of a Wonder3D pipeline, whose `model_index.json` may name classes of a library that is not there."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

# What concerns the download only.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision")


class NotAvailable(OSError, ValueError):
    """A pipeline is neither a folder here nor a repository that can be downloaded."""


_MODELS = ("unet", "vae", "image_encoder")


def local_folder(source: str | os.PathLike, variant: str | None, options: dict[str, Any]) -> Path:
    """The folder itself, or the snapshot of a Hub repository: configurations and safetensors files only.

    diffusers' own download refuses a repository whose components name a class that it cannot import. Raises
    `NotAvailable` where there is neither.
    """
    if os.path.isdir(source):
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    others = [] if variant else ["*.fp16.safetensors", "*.non_ema.safetensors"]
    wanted = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, ignore_patterns=others, **options))
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        # What the client raises for a connection is no OSError, unless it looked into the cache, too.
        if status is None and (
            isinstance(error, LocalEntryNotFoundError) or not isinstance(error, OSError | ValueError)
        ):
            raise NotAvailable(
                f"'{source}' is no folder here and not in the cache, and the Hub was not asked (local_files_only, "
                "HF_HUB_OFFLINE) or cannot be reached. Check the name and the network; what was downloaded once is "
                "found without one."
            ) from error
        what = f"status {status}" if status is not None else type(error).__name__
        raise NotAvailable(
            f"'{source}' is no folder here, and the Hub did not give it ({what}). Check its name and revision; "
            "private and gated repositories need `token=` or `hf auth login`."
        ) from error


def check_weights(folder: Path, given: Collection[str]) -> None:
    """Raise ValueError if a model has no safetensors file; those in `given` are not needed."""
    for name in _MODELS:
        part = folder / name
        if name in given or any(part.glob("*.safetensors")):
            continue
        pickles = sorted(path.name for path in part.glob("*.bin"))
        found = f"only {', '.join(pickles)}" if pickles else "no weights"
        raise ValueError(
            f"{part} has {found}; expected a .safetensors file. Pickled .bin weights are never loaded here, because "
            'a pickle can run code. Convert them once with the few lines in docs/wonder3d.md ("Released weights"), '
            "take a revision that has safetensors files, or pass the component: "
            f"Wonder3DPipeline.from_pretrained(..., {name}=...)."
        )


def available_variant(part: Path, variant: str | None) -> str | None:
    """`variant` if this component has it, else None: as diffusers does for the other components."""
    return variant if variant and any(part.glob(f"*.{variant}*.safetensors")) else None
