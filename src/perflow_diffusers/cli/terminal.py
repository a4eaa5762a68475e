"""What the commands share at the terminal: errors as sentences, progress bars, and care for files that exist."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer
from tqdm import tqdm

from perflow_diffusers.io.atomic import put, staging

#: exit codes: 0 done, 2 what was given cannot work, 130 interrupted
BAD_INPUT, INTERRUPTED = 2, 130


def note(command: str, message: object) -> None:
    """A sentence beside what a command prints, on standard error."""
    typer.echo(f"perflow {command}: note: {message}", err=True)


@contextmanager
def failing(command: str) -> Iterator[None]:
    """Turn the library's errors and warnings into sentences on standard error, and an error into an exit code."""

    def warned(message: Warning | str, *_: object, **__: object) -> None:
        note(command, message)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = warned
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


def check_out(out: Path, force: bool, *, file: bool = True, folder: bool = False) -> None:
    """Refuse (ValueError) an output of another kind than the command writes, one that cannot be written, and one that
    exists, without --force or where --force would delete more than weights."""
    from perflow_diffusers.io.writer import check_file_name, check_folder_name

    if folder and out.suffix != ".safetensors":
        check_folder_name(out)
        if out.is_file():
            raise ValueError(f"{out} is a file, and a folder is to be written. Choose another name.")
    elif file:
        if out.is_dir():
            raise ValueError(f"{out} is a folder, and a file is to be written. Choose another name.")
        check_file_name(out)
    else:
        raise ValueError(f"{out} is to be a folder. Choose a name without .safetensors.")
    check_free(out, force)
    if out.is_dir():
        foreign = sorted(entry.name for entry in out.iterdir() if not _replaceable(entry))
        if foreign:
            raise ValueError(
                f"{out} holds {', '.join(foreign[:5])}{', ...' if len(foreign) > 5 else ''}, which --force does not "
                "delete: it replaces folders of weights alone. Choose another place, or delete the folder yourself."
            )


def check_free(out: Path, force: bool) -> None:
    """Refuse (ValueError) an output that exists, without --force, or whose folder is not there to be written to."""
    if out.exists() and not force and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists already. Choose another name, or pass --force to replace it.")
    if not out.parent.is_dir():
        raise ValueError(f"The folder {out.parent} does not exist. Create it first.")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"The folder {out.parent} cannot be written to. Choose another place.")


def _replaceable(entry: Path) -> bool:
    """Whether it may be in a folder that a command wrote, or one that diffusers or the Hub filled with weights."""
    if entry.is_dir():
        return entry.name in ("scheduler", "images") and all(_replaceable(inner) for inner in entry.iterdir())
    return entry.suffix in (".safetensors", ".json", ".bin", ".md", ".png", ".jpg", ".jpeg", ".webp") or (
        entry.name == ".gitattributes"
    )


@contextmanager
def replacing(out: Path, dry_run: bool = False) -> Iterator[tuple[Path, Callable[[object], str]]]:
    """Where a command writes what will be at `out`, and how what it says is told with the name of `out`.

    That is `out` itself, unless a folder with something in it is there: then a place beside it, which takes the place
    of the whole folder at the end, or is gone if anything fails.
    """
    if dry_run or not out.is_dir() or not any(out.iterdir()):
        yield out, str
        return
    home = out.resolve()
    with staging(home.parent) as beside:
        new = beside / home.name

        def told(text: object) -> str:
            return str(text).replace(str(new), str(out))

        try:
            yield new, told
            put(new, home)
        except (ValueError, OSError) as error:
            raise ValueError(told(error)) from error
