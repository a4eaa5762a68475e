"""Small files, read with limits and written whole or not at all: JSON, text, names that stay in their folder."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perflow_diffusers.errors import ArtifactError, WeightSourceError
from perflow_diffusers.io.atomic import whole

#: No settings file is larger: above it nothing is parsed.
MAX_JSON_BYTES = 1 << 20
_MAX_DEPTH = 16
_MAX_OBJECT_BYTES = 1 << 26  # an index of shards has about 100 bytes a tensor
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,199}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises `ArtifactError` if it is larger than `MAX_JSON_BYTES`, not JSON, no object, nested deeper than 16, or holds
    NaN or infinity.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ArtifactError(
                f"{path} has {path.stat().st_size:,} bytes; settings have at most {MAX_JSON_BYTES:,}. It was not "
                "read: do not use this artefact, or ask its author."
            )
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error}).") from error
    return parse_json(text, str(path))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object in a text, under the limits of `read_json`; `where` names it in errors."""
    if len(text) > MAX_JSON_BYTES:
        raise ArtifactError(f"{where} has {len(text):,} characters; settings have at most {MAX_JSON_BYTES:,}.")
    try:
        content = json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)
        deep = any(depth > _MAX_DEPTH for depth, _ in _walk(content))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not usable JSON ({error}). Download it again, or ask its author.") from error
    if not isinstance(content, dict) or deep:
        what = f"nested deeper than {_MAX_DEPTH} levels" if deep else f"a {type(content).__name__}, not an object"
        raise ArtifactError(f"{where} is {what}. Download it again, or ask its author.")
    if any(isinstance(value, float) and not math.isfinite(value) for _, value in _walk(content)):
        raise ArtifactError(f"{where} holds an infinite number. Download it again, or ask its author.")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless it says something twice: readers differ in which of the two they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return content


def _walk(content: Any) -> Iterator[tuple[int, Any]]:
    """(depth, value) of everything inside."""
    pending = [(0, content)]
    while pending:
        depth, value = pending.pop()
        yield depth, value
        if depth <= _MAX_DEPTH and isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            pending.extend((depth + 1, item) for item in inner)


def plain_name(name: Any, where: str, suffixes: tuple[str, ...] = (".safetensors",)) -> str:
    """A file name without any path in it and with one of `suffixes`; raises `ArtifactError` for anything else."""
    if isinstance(name, str) and _PLAIN_NAME.fullmatch(name) and ".." not in name and name.endswith(suffixes):
        return name
    raise ArtifactError(
        f"{where} names the file {name!r:.100}; expected a plain file name that ends in {' or '.join(suffixes)}, "
        "without a path."
    )


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, with its parent created; raises `ArtifactError` if that is not inside `folder`."""
    target = folder / name
    home = folder.resolve()
    if Path(name).is_absolute() or not (target.parent.resolve() == home or home in target.parent.resolve().parents):
        raise ArtifactError(f"{name!r} lies outside {folder}: nothing is written there. Choose another folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def write_text(folder: Path, name: str, text: str, *, overwrite: bool) -> Path:
    """Write a small file into `folder`, under a temporary name first."""
    return place(folder, name, overwrite, lambda path: path.write_text(text, encoding="utf-8"))


def write_json(folder: Path, name: str, content: dict[str, Any], *, overwrite: bool) -> Path:
    """Write an object as JSON into `folder`, under a temporary name first."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    return write_text(folder, name, text, overwrite=overwrite)


def copy_file(source: Path, folder: Path, name: str, *, overwrite: bool) -> Path:
    """Copy a file's content into `folder`, under a temporary name first; links are followed, never made."""
    return place(folder, name, overwrite, lambda path: shutil.copyfile(source, path))


def place(folder: Path, name: str, overwrite: bool, fill: Callable[[Path], object]) -> Path:
    """Let `fill` write a file under a temporary name in `folder`, then give it its name."""
    target = inside(folder, name)
    check_free(target, overwrite)
    try:
        with whole(target) as temporary:
            fill(temporary)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written ({error.strerror or error}).") from error
    return target


def check_free(target: Path, overwrite: bool) -> None:
    """Raises `ArtifactError` if `target` is a folder, or exists and may not be replaced."""
    if target.is_dir():
        raise ArtifactError(f"{target} is a folder. Choose another place.")
    if os.path.lexists(target) and not overwrite:
        raise ArtifactError(f"{target} exists. Pass overwrite=True to replace it, or choose another folder.")


def parsed(text: str | bytes) -> Any:
    """What `json.loads` says, with a ValueError for text that is nested too deep for it, too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; `what` says what the file should be.

    Raises `WeightSourceError` if it cannot be read, is larger than 64 MiB, or holds anything else.
    """
    try:
        size = path.stat().st_size
        content = parsed(path.read_bytes()) if size <= _MAX_OBJECT_BYTES else f"{size:,} bytes"
    except (OSError, ValueError) as error:
        raise WeightSourceError(f"{path} is not {what} ({error}). Download or write it again.") from error
    if not isinstance(content, dict):
        shown = content if size > _MAX_OBJECT_BYTES else f"a JSON {type(content).__name__}, not an object"
        raise WeightSourceError(f"{path} is not {what} (it is {shown}). Download or write it again.")
    return content
