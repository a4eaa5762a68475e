"""The manifest of a cache: what it was made from, which shards it has and what is in them."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from perflow_diffusers.io.atomic import write_whole
from perflow_diffusers.io.repository import file_sha256
from perflow_training.data.identity import same_model
from perflow_training.errors import DataError

NAME = "manifest.json"
FORMAT = "perflow-cache-1"
EMPTY_PROMPT = "empty_prompt.safetensors"
#: options that change what is encoded, beside the source itself
OPTIONS = (
    "resolution", "min_image_size", "center_crop", "random_flip", "aspect_buckets", "bucket_step", "bucket_max_ratio",
)  # fmt: skip


def read_manifest(folder: Path) -> dict | None:
    """The manifest in `folder`, or None if there is none. Raises DataError for one of another format."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}). Delete the cache and make it again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a cache in the format {FORMAT}.")
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    """Replace the manifest in one step: a reader sees the old or the new one."""
    write_whole(folder / NAME, json.dumps(manifest, indent=1), synced=True)


def check_same(folder: Path, manifest: dict, wanted: dict) -> None:
    """Raise DataError naming the first thing in which a cache was made otherwise than `wanted` says."""
    way_out = f"Set `train_cache_dir` to another folder, or delete {folder} and make it again."
    for name, value in wanted.items():
        if name == "min_image_size" and name not in manifest:
            continue  # older than the option
        made = manifest.get(name)
        if name == "model":
            if not same_model(str(made), value):
                raise DataError(f"The cache {folder} was made with the model {made}, not with {value}. {way_out}")
        elif name == "source":
            if made != value:
                raise DataError(
                    f"The cache {folder} was made from other data: their fingerprint is {str(made)[:12]}, that of the "
                    f"source given now {value[:12]}. {way_out}"
                )
        elif made != value:
            raise DataError(f"The cache {folder} was made with `{name}={made}`, not with {value}. {way_out}")


def check_files(folder: Path, manifest: dict, *, hashes: bool) -> None:
    """Raise DataError unless each file is there with its size, its rows and (if `hashes`) its SHA-256."""
    for entry in [*manifest["shards"], manifest["empty_prompt"]]:
        if entry["file"] is None:
            continue
        path = folder / entry["file"]
        problem = _problem(path, entry, hashes)
        if problem:
            raise DataError(f"{path} {problem}. Copy the cache anew, or delete {folder} and make it again.")


def _problem(path: Path, entry: dict, hashes: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
    if hashes and file_sha256(path) != entry["sha256"]:
        return "has other contents than when it was written (SHA-256)"
    try:
        with safe_open(path, framework="pt") as opened:
            for group, rows in entry.get("groups", {}).items():
                if opened.get_slice(f"{group}/prompt_embeds").get_shape()[0] != rows:
                    return f"does not hold {rows} rows of {group}"
    except SafetensorError as error:
        return f"is damaged ({error})"
    return None
