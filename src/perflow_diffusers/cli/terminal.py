"""What the commands share at the terminal: errors as sentences, progress bars, and care for files that exist."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from tqdm import tqdm

#: exit codes: 0 done, 2 what was given cannot work, 130 interrupted
BAD_INPUT, INTERRUPTED = 2, 130


@contextmanager
def failing(command: str) -> Iterator[None]:
    """Turn the library's errors and warnings into sentences on standard error, and an error into an exit code."""

    def note(message: Warning | str, *_: object, **__: object) -> None:
        typer.echo(f"perflow {command}: note: {message}", err=True)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = note
            # diffusers gives huggingface_hub an option of former days; no user can do anything about it
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument is deprecated")
            yield
    except (ValueError, OSError) as error:
        typer.echo(f"perflow {command}: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None


def interrupted(command: str) -> NoReturn:
    """End a command that Ctrl-C stopped."""
    typer.echo(f"perflow {command}: interrupted; no file was changed.", err=True)
    raise typer.Exit(INTERRUPTED) from None


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, driven by `progress(done, total)`; silent where nobody looks."""
    with tqdm(desc=what, unit="tensor", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def check_out(out: Path, force: bool) -> None:
    """Refuse (ValueError) an output that exists, without --force, or whose folder does not."""
    if out.exists() and not force and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already. Choose another name, or pass --force to replace it.")
    if not out.parent.is_dir():
        raise ValueError(f"The folder {out.parent} does not exist. Create it first.")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"The folder {out.parent} cannot be written to. Choose another place.")
