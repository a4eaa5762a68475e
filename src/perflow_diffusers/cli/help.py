"""What `--help` says of a command: its docstring, prose wrapped to the terminal, examples left as they are."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

_WIDTH = 74  # of a line of an example: with its indentation it stays within 80 columns
_WORD = re.compile(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""")


def help_of(command: Callable[..., Any]) -> str:
    """The docstring, with every example (an indented line) as lines that can be copied into a shell.

    A longer one goes on in the next line after a backslash. Typer would wrap examples like prose.
    """
    parts: list[str] = []
    for paragraph in (inspect.getdoc(command) or "").split("\n\n"):
        if not paragraph.startswith(" "):
            parts.append(paragraph)
            continue
        lines = [f"  {line}" for example in paragraph.splitlines() for line in _lines(example.strip())]
        if parts[-1].startswith("\b"):
            parts[-1] = "\n".join([parts[-1], *lines])
        else:
            parts.append("\n".join(["\b", *lines]))  # by the mark Typer knows lines that are not to be wrapped
    return "\n\n".join(parts)


def _lines(example: str) -> Iterator[str]:
    """A command line in lines of at most `_WIDTH`, if its words allow it; an option stays with its value."""
    words: list[str] = []
    for word in _WORD.findall(example):
        if words and words[-1].startswith("--") and " " not in words[-1] and not word.startswith("-"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    line = words[0]
    for word in words[1:]:
        if len(line) + len(word) + len("  \\") > _WIDTH:
            yield f"{line} \\"
            line = f"    {word}"
        else:
            line += f" {word}"
    yield line
