"""A folder of pictures, with captions in its metadata or beside them."""

import csv
import json
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from perflow_training.data.sources.record import PICTURES, Record, caption_of, digest, own_caption
from perflow_training.errors import DataError
from perflow_training.text import read_text


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
        records = ((name, self[index], self.folder / name) for index, name in enumerate(self.names))
        return digest(
            (name, record.caption, path.stat().st_size if path.is_file() else None) for name, record, path in records
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
