"""What objects look like at a prompt and in a notebook: a few lines, however much they hold.

`@shown` above a dataclass, `LongDict` and `LongTuple` for what they hold, `html_table` for notebooks.
"""

import html
import re
import reprlib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

LINES, WIDTH = 10, 100
_HTML_ROWS = 40
_NUMBER = re.compile(r"-?[\d.,]+(e[-+]\d+)?( [kMG]i?B| %)?")
_AT_LEFT = ' style="margin-left:0"'  # JupyterLab centres what says nothing

Kind = TypeVar("Kind", bound=type)


class _Brief(reprlib.Repr):
    """Values in a few words: tensors by shape, modules by class, long containers by their first entries."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring, self.maxother = 48, 72

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, torch.Tensor):
            where = "" if x.device.type == "cpu" else f" on {x.device}"
            return f"<tensor {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{where}>"
        if isinstance(x, torch.nn.Module) or hasattr(x, "save_pretrained"):
            return f"<{type(x).__name__}>"
        if isinstance(x, dict | MappingProxyType):
            return self.repr_dict(x, level)  # type: ignore[arg-type]
        if isinstance(x, tuple):
            return self.repr_tuple(x, level)
        if getattr(type(x), "__repr__", None) is _repr:
            return f"<{type(x).__name__}>" if level < self.maxlevel - 1 else _words(x)
        return super().repr_instance(x, level)


_BRIEF = _Brief()


def brief(value: Any) -> str:
    """Any value in one line of at most 160 characters."""
    return _cut(" ".join(_BRIEF.repr(value).split()), 160)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 4]} ..."


def shown(kind: Kind) -> Kind:
    """A dataclass whose repr has at most ten lines of a hundred characters; put above `@dataclass`.

    With a `__str__` the repr is `<Kind: its first paragraph>`, else the fields, each in a few words.
    """
    kind.__repr__ = _repr  # type: ignore[method-assign, assignment]
    return kind


def folded(text: str, width: int = WIDTH, lines: int = LINES) -> str:
    """A text in lines that fit, the rest of it left out."""
    parts = [
        part
        for line in text.splitlines()
        for part in textwrap.wrap(line, width, subsequent_indent="    ", replace_whitespace=False) or [""]
    ]
    return "\n".join(parts if len(parts) <= lines else [*parts[: lines - 1], "..."])


def _repr(self: Any) -> str:
    return folded(_words(self))


def _words(thing: Any) -> str:
    kind = type(thing)
    if kind.__str__ is not object.__str__:
        return f"<{kind.__name__}: {str(thing).partition(chr(10) * 2)[0]}>"
    said = (f"{one.name}={brief(getattr(thing, one.name))}" for one in fields(thing) if one.repr)
    return f"{kind.__name__}({', '.join(said)})"


class LongDict(dict):
    """A dict that shows its first entries and how many there are; `dict(it)` shows all."""

    def __repr__(self) -> str:
        return _first("{}", (f"{brief(key)}: {brief(value)}" for key, value in self.items()), len(self))


class FixedDict(LongDict):
    """The same, and nobody can change it: TypeError, as of a `mappingproxy`."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError("This dict is read-only. `dict(it)` is a copy that can be changed.")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple:
        return FixedDict, (dict(self),)


class LongTuple(tuple):
    """A tuple that shows its first entries and how many there are; `list(it)` shows all."""

    __slots__ = ()

    def __repr__(self) -> str:
        return _first("()", map(brief, self), len(self)) if len(self) != 1 else f"({brief(self[0])},)"


def _first(brackets: str, entries: Iterable[str], count: int) -> str:
    """As many of the entries as fit into a few lines."""
    line, lines, number = brackets[0], [], 0
    for number, entry in enumerate(entries, start=1):
        end = brackets[1] if number == count else ","
        if len(line) + len(entry) > WIDTH - 18 and len(line) > 1:  # room for the end
            lines.append(line)
            line = ""
        if len(lines) == LINES - 2:
            return "\n".join([*lines, f" ... {count - number + 1} more{brackets[1]}"])
        line += f"{' ' if line != brackets[0] else ''}{_cut(entry, WIDTH - 20)}{end}"
    return "\n".join([*lines, line if number else brackets])


def shorten(thing: Any) -> None:
    """Make the dicts and tuples that a dataclass holds short at a prompt; for its `__post_init__`."""
    for one in fields(thing):
        value = getattr(thing, one.name)
        if type(value) is dict:
            short: Any = LongDict(value)
        elif type(value) is MappingProxyType:
            short = FixedDict(value)  # notebooks print all of a mappingproxy
        elif type(value) is tuple:
            short = LongTuple(value)
        else:
            continue
        object.__setattr__(thing, one.name, short)


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain table for a notebook in the notebook's own colours; columns of numbers end below each other.

    Give the cells of such a column the same decimals. All values are escaped; rows beyond 40 are counted.
    """
    rows = list(rows)
    kept = rows[:_HTML_ROWS]
    is_number = [all(_NUMBER.fullmatch(str(row[place])) for row in rows) for place in range(len(columns))]

    def line(cells: Iterable[Any], tag: str) -> str:
        parts = (
            _cell(cell, tag, "right" if number else "left") for cell, number in zip(cells, is_number, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in kept)
    more = f"<p>... {len(rows) - len(kept)} more</p>" if len(rows) > len(kept) else ""
    return f"{_title(caption)}<table{_AT_LEFT}><thead>{line(columns, 'th')}</thead><tbody>{body}</tbody></table>{more}"


def html_facts(caption: str, facts: Iterable[tuple[str, Any]]) -> str:
    """Names and values in words, for a notebook."""
    rows = "".join(f"<tr>{_cell(name, 'th', 'left')}{_cell(value, 'td', 'left')}</tr>" for name, value in facts)
    return f"{_title(caption)}<table{_AT_LEFT}><tbody>{rows}</tbody></table>"


def _title(text: str) -> str:
    """Above a table and not in its <caption>, which notebooks make as narrow as the table."""
    return f'<div style="white-space:pre-line">{html.escape(text)}</div>' if text else ""


def _cell(value: Any, tag: str, side: str) -> str:
    return f'<{tag} style="text-align:{side}">{html.escape(str(value))}</{tag}>'


def aligned(facts: Iterable[tuple[str, object]], columns: int = 80) -> list[str]:
    """Names and values as lines of a terminal: values below each other, long ones wrapped within `columns`."""
    rows = [(name, str(value)) for name, value in facts]
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        room = max(columns - width - 4, 20)
        parts = textwrap.wrap(value, room, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"  {'' if number else name:{width}}  {part}".rstrip() for number, part in enumerate(parts)]
    return lines


def size_in_words(nbytes: int) -> str:
    """Bytes as people say them: 3.88 MB, 1.72 GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def plain(report: Any) -> dict[str, Any]:
    """The fields of a dataclass as values for `json.dumps`, paths as text; short at a prompt."""
    return LongDict({key: str(value) if isinstance(value, Path) else value for key, value in asdict(report).items()})
