"""Which model encoded a cache, told without loading it."""

import hashlib
from pathlib import Path

from perflow_diffusers.families import ANY_COMPONENTS


def model_identity(name: str, revision: str | None = None, *, network: bool = False) -> str:
    """What tells encoders apart without loading them: a Hub id, or names and contents of a folder's encoder files.

    For a local pipeline the configuration and tokenizer files count with all bytes, and weights with their size and
    first megabyte; where the folder lies does not count. `network`: of the network that denoises, too.
    """
    folder = Path(name)
    if not folder.is_dir():
        return f"{name}@{revision}" if revision else name
    parts = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *(ANY_COMPONENTS if network else ()))
    total = hashlib.sha256()
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(1 << 20))
    return f"{folder.resolve().name}#{total.hexdigest()[:16]}"


def same_model(one: str, other: str) -> bool:
    """Whether two identities name the same encoders; the name of a local folder does not matter."""
    return one.rpartition("#")[2] == other.rpartition("#")[2]
