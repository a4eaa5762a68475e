"""A record of a caption and an undecoded picture, and what every source of them offers."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from perflow_diffusers.words.shown import shown
from perflow_training.errors import DataError
from perflow_training.text import decoded, text_fault

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"))


@shown
@dataclass(frozen=True)
class Record:
    """One example before anything is decoded; `caption` is None, text or several texts to choose from.

    `problem` says why there is a caption that cannot be used.
    """

    name: str
    caption: str | list[str] | None
    image: Path | bytes | None
    problem: str = ""


class IndexedSource(Protocol):
    """Records by number, each at the same cost."""

    @property
    def has_images(self) -> bool: ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def fingerprint(self) -> str: ...


@runtime_checkable
class ShardedSource(Protocol):
    """Records that come one after the other out of `num_shards` parts of unknown length."""

    @property
    def has_images(self) -> bool: ...
    @property
    def num_shards(self) -> int: ...

    def read(self, shard: int, start: int) -> Iterator[Record]: ...
    def fingerprint(self) -> str: ...


Source = IndexedSource | ShardedSource


def digest(parts: Iterable[object]) -> str:
    """SHA-256 over the JSON of each part, a line each."""
    total = hashlib.sha256()
    for part in parts:
        total.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return total.hexdigest()


def caption_of(row: dict, column: str) -> str | list[str] | None:
    """The caption in a row of a table: `column`, or where that is empty `caption` or `text`.

    Raises DataError for something that is neither text nor a list of texts (numbers are written out).
    """
    for name in (column,) if column else ("caption", "text"):
        if row.get(name) is not None:
            value = row[name]
            texts = list(value) if isinstance(value, (list, tuple)) else [value]
            texts = [text for text in texts if text is not None]
            odd = [text for text in texts if isinstance(text, bool) or not isinstance(text, (str, int, float))]
            if odd:
                raise DataError(f"`{name}` holds {type(odd[0]).__name__}, and a caption is text or a list of texts")
            return [str(text) for text in texts] if isinstance(value, (list, tuple)) else str(value)
    return None


def own_caption(data: bytes, what: str) -> tuple[str | None, str]:
    """(caption, problem) of a text that belongs to one example alone: a bad one is left out and counted."""
    fault = text_fault(data)
    return (decoded(data, what), "") if fault is None else (None, f"{what} is {fault.what}. {fault.way_out}")
