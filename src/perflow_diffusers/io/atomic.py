"""Files and folders that appear when they are complete: written under a temporary name beside their place, renamed."""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: How everything unfinished is called, so that it can be told from what counts: `.perflow-<random>.tmp`.
UNFINISHED = (".perflow-", ".tmp")


def unfinished(target: Path) -> Path:
    """A name beside `target` that nothing has, for what is to take its place."""
    before, after = UNFINISHED
    return target.with_name(f"{before}{secrets.token_hex(4)}{after}")


@contextmanager
def whole(target: Path, *, synced: bool = False) -> Iterator[Path]:
    """A name to write a file or a folder under; what is there at the end is renamed to `target`.

    If anything fails, what was at `target` before is intact and nothing is left over. `synced`: it survives a power
    cut from then on.
    """
    temporary = unfinished(target)
    try:
        yield temporary
        if synced:
            sync(temporary)
        put(temporary, target)
        if synced:
            sync_folder(target.parent)
    finally:
        remove(temporary)


def write_whole(target: Path, content: str | bytes, *, synced: bool = False) -> Path:
    """Write a small file (text as UTF-8), complete or not at all; replaces what is there. Raises OSError."""
    with whole(target, synced=synced) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    return target


def put(new: Path, target: Path) -> None:
    """Rename a complete file or folder to `target`; a folder that is there goes once the new one has its name."""
    if not new.is_dir() or not target.is_dir():
        os.replace(new, target)
        return
    old = unfinished(target)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, gone afterwards, for files that are to appear together (`put_together`)."""
    inner = unfinished(folder / "files")
    inner.mkdir()
    try:
        yield inner
    finally:
        remove(inner)


def put_together(staged: Path, folder: Path, names: Iterable[str], former: Iterable[str] = ()) -> None:
    """Give staged files their names in `folder`, the last one last, and delete those of `former` that are not new."""
    names = list(names)
    for name in names:
        os.replace(staged / name, folder / name)
    for old in set(former).difference(names):
        (folder / old).unlink(missing_ok=True)
    sync_folder(folder)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all in it; nothing is said of what is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.parent.is_dir():
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make a file, or a folder with all in it, survive a power cut, before a rename says that it is there."""
    for one in [*(path.rglob("*") if path.is_dir() else ()), path]:
        if one.is_dir():
            sync_folder(one)
        else:
            with one.open("r+b") as file:
                os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
