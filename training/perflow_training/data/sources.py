"""Records of captions and undecoded pictures: from a text file or a folder; what every source offers."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Protocol

from perflow_diffusers.words.shown import shown

from .options import DataError, DataOptions
from .text import decoded, read_text, text_fault

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

    has_images: bool

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Record: ...
    def fingerprint(self) -> str: ...


class ShardedSource(Protocol):
    """Records that come one after the other out of `num_shards` parts of unknown length."""

    has_images: bool
    num_shards: int

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


class TextSource:
    """A text file with one caption a line; empty lines are no examples."""

    has_images = False

    def __init__(self, path: Path):
        self.path = path
        self.captions = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not self.captions:
            raise DataError(f"`train_captions={path}` holds no captions. Write one a line.")

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> Record:
        return Record(f"{self.path.name}, caption {index + 1}", self.captions[index], None)

    def fingerprint(self) -> str:
        return digest(self.captions)


class FolderSource:
    """A folder of pictures and its subfolders, in the order of their names.

    The caption stands in the `metadata.jsonl` or `metadata.csv` of the picture's folder or of one above it (columns
    `file_name`, relative to the metadata, and the caption), otherwise in `<name>.txt` beside the picture. Rows whose
    picture does not exist are kept, so that they are counted.
    """

    has_images = True

    def __init__(self, folder: Path, caption_column: str = ""):
        self.folder = folder
        self.captions: dict[str, str | list[str] | None] = {}
        found = set()
        for root, folders, files in os.walk(folder, followlinks=True):
            folders.sort()
            place = Path(root).relative_to(folder)
            for name in sorted(files):
                if Path(name).suffix.lower() in PICTURES:
                    found.add((place / name).as_posix())
                elif name in ("metadata.jsonl", "metadata.csv"):
                    self._read_metadata(Path(root) / name, place, caption_column)
        self.names = sorted(found | self.captions.keys())
        if not self.names:
            endings = ", ".join(sorted(PICTURES))
            raise DataError(f"`train_data_dir={folder}` holds no pictures ({endings}) and no metadata of such.")

    def _read_metadata(self, path: Path, place: Path, caption_column: str) -> None:
        rows = list(_csv_rows(path) if path.suffix == ".csv" else _json_rows(path))
        columns = {column for _, row in rows for column in row}
        wanted = {caption_column} if caption_column else {"caption", "text"}
        if rows and ("file_name" not in columns or not columns & wanted):
            raise DataError(
                f"{path} has the columns {', '.join(sorted(columns))}; it needs `file_name` and "
                f"{' or '.join(sorted(wanted))}. Set `caption_column` if the captions stand elsewhere."
            )
        for line, row in rows:
            file_name = row.get("file_name")
            if not isinstance(file_name, str) or not file_name:
                raise DataError(f"{path}, line {line}: `file_name={file_name!r}` does not name a picture.")
            name = os.path.normpath((place / file_name).as_posix()).replace(os.sep, "/")
            try:
                self.captions[name] = caption_of(row, caption_column)
            except DataError as error:
                raise DataError(f"{path}, line {line}: {error}.") from error

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        name = self.names[index]
        path = self.folder / name
        caption, problem = self.captions.get(name), ""
        if caption is None and (beside := path.with_suffix(".txt")).is_file():
            caption, problem = own_caption(beside.read_bytes(), "the text file beside it")
        return Record(name, caption, path, problem)

    def fingerprint(self) -> str:
        """Names, sizes and captions: not the place of the folder nor the times of its files."""
        return digest(
            (name, record.caption, record.image.stat().st_size if record.image.is_file() else None)
            for name, record in ((name, self[index]) for index, name in enumerate(self.names))
        )


def _csv_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, row) of a CSV file with a heading. Raises DataError naming the line."""
    rows = csv.DictReader(StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in rows:
            if None in row:
                raise DataError(
                    f"{path}, line {rows.line_num} has more fields than the heading's {len(row) - 1}. Put texts with "
                    "commas into double quotes."
                )
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.reader.line_num}: {error}. Is a double quote left open?") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line, object) of a file with one JSON object a line. Raises DataError naming the line."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}. Write one object a line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}. Write one object a line.")
        yield number, row


def open_source(options: DataOptions, *, with_images: bool) -> Source:
    """The source that `options` name. Raises DataError if there is none, or no pictures where they are wanted."""
    source = _open(options, with_images)
    if with_images and not source.has_images:
        raise DataError(
            "Pictures are wanted, but the source has captions only. Give one with pictures (`train_data_dir`, "
            "`dataset_name`, `train_shards`, or a table with an image column), or start from the teacher's own "
            "trajectories, which need none."
        )
    return source


def _open(options: DataOptions, with_images: bool) -> Source:
    from . import tables

    if options.train_captions:
        path = Path(options.train_captions)
        if not path.is_file():
            raise DataError(f"`train_captions={path}` is not a file. Give a text file or a table ({tables.ENDINGS}).")
        return tables.table_file(path, options, with_images) if tables.is_table(path) else TextSource(path)
    if options.train_data_dir:
        folder = Path(options.train_data_dir)
        if not folder.is_dir():
            raise DataError(f"`train_data_dir={folder}` is not a folder.")
        if tables.is_saved(folder):
            return tables.saved_dataset(folder, options, with_images)
        return FolderSource(folder, options.caption_column)
    if options.dataset_name:
        return tables.named_dataset(options, with_images)
    if options.train_shards:
        from .shards import TarSource

        return TarSource(options.train_shards, options.caption_column)
    raise DataError(
        "No source of examples is set. Give one of `train_data_dir`, `train_captions`, `dataset_name`, `train_shards`."
    )
