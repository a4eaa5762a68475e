"""Text from outside: UTF-8, with or without a mark, and nothing else; what is otherwise is named with its way out."""

import codecs
from dataclasses import dataclass
from pathlib import Path

from perflow_training.errors import DataError

#: marks at the beginning of a file; UTF-32's little-endian one begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True)
class TextFault:
    """Why bytes are no text: `what` holds neither a file's name nor a line, so that equal faults count as one."""

    what: str
    line: int  # from 1
    encoding: str  # a guess, for the way out

    @property
    def way_out(self) -> str:
        return f"Convert it: iconv -f {self.encoding} -t UTF-8 OLD > NEW"


def text_fault(data: bytes) -> TextFault | None:
    """What is wrong with `data` as UTF-8 text, if anything."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return TextFault(f"{encoding} and not UTF-8", 1, encoding)
    if b"\0" in data:  # no text has them; UTF-16 without a mark has one beside each letter
        before = data[: data.index(b"\0")]
        return TextFault("not text but has null bytes, as UTF-16 has", before.count(b"\n") + 1, "UTF-16LE")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return TextFault("not UTF-8", data.count(b"\n", 0, error.start) + 1, "LATIN1")
    return None


def decoded(data: bytes, name: str | Path) -> str:
    """The text of `data` without the mark at its beginning. Raises DataError naming `name` and the line."""
    fault = text_fault(data)
    if fault is not None:
        raise _error(fault, name)
    return data.decode("utf-8-sig")


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError naming it and the line."""
    return decoded(path.read_bytes(), path)


def check_text(path: Path) -> None:
    """Raises DataError, as `read_text` does, for a file that another library is going to read; holds a line of it."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            fault = text_fault(line)
            if fault is not None:
                raise _error(fault, path, number)


def _error(fault: TextFault, name: str | Path, lines_before: int = 0) -> DataError:
    return DataError(f"{name}, line {lines_before + fault.line}: this is {fault.what}. {fault.way_out}")
