"""The manifest of a checkpoint, size and SHA-256 of each file, so that damage is found before anything is used."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from perflow_diffusers.io.repository import file_sha256

MANIFEST = "manifest.json"
FORMAT = "perflow-checkpoint-1"
THREADS = 4  # hashing leaves the interpreter free


def files_of(folder: Path) -> list[str]:
    """The files in and below `folder` that a manifest lists, by name."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def entries(folder: Path, names: Iterable[str]) -> dict[str, dict]:
    """Name -> {bytes, sha256} of files in `folder`."""
    names = list(names)
    with ThreadPoolExecutor(THREADS, "hash") as pool:
        hashes = list(pool.map(file_sha256, [folder / name for name in names]))
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": value}
        for name, value in zip(names, hashes, strict=True)
    }


def write_manifest(folder: Path, files: dict[str, dict], written: float) -> None:
    """Writes the manifest, which is what makes a folder a complete checkpoint."""
    content = {"format": FORMAT, "written": written, "files": dict(sorted(files.items()))}
    content["sha256"] = _own_hash(content)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder; None if there is none, or if it is not as it was written."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        own = content.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return content if own == _own_hash(content) and content["format"] == FORMAT else None


def _own_hash(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with the first damaged file that the manifest of `folder` lists, None if all is as written.

    Sizes are compared before any file is read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or damaged"
    wanted = manifest["files"]
    for name, entry in wanted.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,} bytes, not {entry['bytes']:,}"
    try:
        found = entries(folder, wanted)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    broken = [name for name in wanted if found[name] != wanted[name]]
    return f"{broken[0]} has other contents than were written (SHA-256)" if broken else None
