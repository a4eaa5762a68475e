"""Sources read by the `datasets` library: local tables, saved datasets, the Hub; whole or streamed."""

import csv
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from perflow_training.config.data import DataOptions
from perflow_training.data.sources.record import Record, Source, caption_of, digest
from perflow_training.errors import DataError
from perflow_training.text import check_text, decoded

#: endings of files that are tables, and the builder of `datasets` that reads them
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
ENDINGS = ", ".join(BUILDERS)


def is_table(path: Path) -> bool:
    return path.suffix.lower() in BUILDERS


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def table_file(path: Path, options: DataOptions, with_images: bool) -> Source:
    builder = BUILDERS[path.suffix.lower()]
    reading: dict[str, Any] = {}
    if builder in ("csv", "json"):
        check_text(path)
    if builder == "csv":  # every field is text: pandas would take `no` for text, `None` for nothing and 007 for 7
        names = _heading(path)
        reading = {"features": Features({name: Value("string") for name in names}), "keep_default_na": False}
    with _named(f"{path}", path if builder == "json" else None):
        table = load_dataset(
            builder, data_files=str(path), split="train", streaming=options.dataset_streaming, **reading
        )
        _first(table)
    return _source(table, options, with_images, [builder, path.name, path.stat().st_size])


def saved_dataset(folder: Path, options: DataOptions, with_images: bool) -> Source:
    saved = load_from_disk(str(folder))
    if isinstance(saved, DatasetDict):
        if options.dataset_split not in saved:
            raise DataError(f"`dataset_split={options.dataset_split}` is not one of {', '.join(saved)} in {folder}.")
        saved = saved[options.dataset_split]
    return _source(saved, options, with_images, [])


def named_dataset(options: DataOptions, with_images: bool) -> Source:
    """`dataset_name` as `datasets.load_dataset` understands it. Its errors come out as DataError, with its reason."""
    folder = Path(options.dataset_name)
    if folder.is_dir() and is_saved(folder):
        return saved_dataset(folder, options, with_images)
    with _named(f"`dataset_name={options.dataset_name}`"):
        table = load_dataset(
            options.dataset_name,
            options.dataset_config_name,
            data_files=options.dataset_files,
            revision=options.dataset_revision,
            split=options.dataset_split,
            streaming=options.dataset_streaming,
        )
        _first(table)
    names = ("dataset_name", "dataset_config_name", "dataset_revision", "dataset_split", "dataset_files")
    return _source(table, options, with_images, [getattr(options, name) for name in names])


@contextmanager
def _named(what: str, lines: Path | None = None) -> Iterator[None]:
    """Errors of `datasets` and of the readers behind it as DataError, with the line of a broken JSON file."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, DatasetsError) as error:
        cause = error.__cause__ or error  # behind "An error occurred while generating the dataset"
        where = _broken_line(lines) if lines is not None else ""
        raise DataError(f"{what} could not be opened: {where or cause}") from error


def _first(table: Dataset | IterableDataset) -> None:
    """Reads the first row of a stream, so that a file that is none is noticed before training."""
    if isinstance(table, IterableDataset):
        next(iter(table), None)


def _broken_line(path: Path) -> str:
    """Which line of a file of JSON objects is none; empty for a file that is one JSON text."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = decoded(line, path).strip() if number == 1 else line.decode("utf-8").strip()
            if number == 1 and text.startswith("["):
                return ""
            try:
                row = json.loads(text) if text else {}
            except ValueError as error:
                return f"line {number} is not JSON: {error}. Write one object a line."
            if not isinstance(row, dict):
                return f"line {number} is a JSON {type(row).__name__}. Write one object a line."
    return ""


def _heading(path: Path) -> list[str]:
    """The names of a CSV file's columns."""
    with path.open("rb") as file:
        first = decoded(file.readline(), path)
    names = next(csv.reader(StringIO(first)), [])
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path}, line 1: the heading must name each column once, and is {first.strip()!r}.")
    return names


def _source(table: Dataset | IterableDataset, options: DataOptions, with_images: bool, origin: list) -> Source:
    columns = table.column_names
    if columns is None:  # a stream whose columns are known only once it is read
        columns = list(next(iter(table), {}))
    caption = next((name for name in (options.caption_column or "caption", "text") if name in columns), None)
    if caption is None or (options.caption_column and caption != options.caption_column):
        wanted = options.caption_column or "caption or text"
        raise DataError(
            f"The examples have the columns {', '.join(columns)}, and no {wanted}. Set `caption_column` to one of "
            "them."
        )
    image = options.image_column if options.image_column in columns else None
    if with_images and image is None:
        raise DataError(
            f"The examples have the columns {', '.join(columns)}, and no `image_column={options.image_column}`. Set "
            "it to the one that holds pictures, or train without pictures."
        )
    table = table.select_columns([caption, image] if with_images else [caption])
    if with_images and isinstance((table.features or {}).get(image), Image):
        table = table.cast_column(image, Image(decode=False))
    kind = (table.features or {}).get(caption)
    classes = kind.names if isinstance(kind, ClassLabel) else []
    make: Any = StreamedTable if isinstance(table, IterableDataset) else StoredTable
    return make(table, caption, image if with_images else None, image is not None, origin, classes)


class _Table:
    def __init__(
        self, table, caption: str, image: str | None, has_images: bool, origin: list, classes: list[str] | None = None
    ):
        self.table = table
        self.caption = caption
        self.image = image
        self.has_images = has_images
        self.origin = origin
        self.classes = classes  # names of what the caption column numbers

    def _record(self, row: dict[str, Any], name: str) -> Record:
        picture = None if self.image is None else row[self.image]
        if isinstance(picture, dict):
            path = picture.get("path")
            name = f"{name} ({path})" if path else name
            picture = picture.get("bytes") or path
        if isinstance(picture, str):
            picture = _bytes_of(picture) if "://" in picture and "::" in picture else Path(picture)
        if self.classes and row[self.caption] is not None:
            return Record(name, self.classes[row[self.caption]], picture)
        return Record(name, caption_of(row, self.caption), picture)


def _bytes_of(chained: str) -> bytes:
    """A file inside a remote archive, in the notation of fsspec that streamed datasets use."""
    import fsspec

    with fsspec.open(chained, "rb") as file:
        return file.read()


class StoredTable(_Table):
    """Rows on disk, by number."""

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Record:
        return self._record(self.table[index], f"row {index}")

    def fingerprint(self) -> str:
        """All captions, their order and, where there are pictures, the bytes of a thousand of them."""
        if self.image is None:
            return digest([len(self), *self.table[self.caption]])
        rows = range(0, len(self), max(1, len(self) // 1000))
        pictures = (self[index].image for index in rows)
        return digest(
            [
                len(self),
                *self.table.select_columns([self.caption])[self.caption],
                *(hashlib.sha256(p).hexdigest() if isinstance(p, bytes) else str(p) for p in pictures),
            ]
        )


class StreamedTable(_Table):
    """Rows as they come, from one file (shard) after the other."""

    @property
    def num_shards(self) -> int:
        return self.table.num_shards

    def read(self, shard: int, start: int) -> Iterator[Record]:
        rows = self.table.shard(self.num_shards, shard) if self.num_shards > 1 else self.table
        for number, row in enumerate(rows.skip(start) if start else rows, start=start):
            yield self._record(row, f"row {number} of shard {shard}")

    def fingerprint(self) -> str:
        """Where it comes from and in how many shards: its rows are not read for this."""
        return digest([*self.origin, self.num_shards])
