"""What processes must agree on before they write into one folder: that it is one, is theirs, and that all can."""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from perflow_training.config import ConfigError

T = TypeVar("T")
LOCK = ".perflow-run.lock"
PATIENCE = 10.0  # seconds in which a network disk must show a file that another machine has written


class FailedSomewhere(OSError):
    """Something that was to be done by all processes and failed on at least one; the message says what happened."""


def on_all(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """`act()` on every process; FailedSomewhere on all of them if it fails on one, so that none waits for others."""
    result, problem = None, ""
    try:
        result = act()
    except Exception as error:  # of whatever library: a process that just leaves makes the others hang
        problem = f"{error}" or type(error).__name__
    problems = [text for text in gather_object([problem]) if text]
    if problems:
        raise FailedSomewhere(problems[0])
    return result  # type: ignore[return-value]


def by_main(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """`decide()` of the main process on all processes; its ConfigError, too."""
    box: list = [None, None]
    if accelerator.is_main_process:
        try:
            box[0] = decide()
        except (ConfigError, OSError) as error:
            box[1] = str(error)
    broadcast_object_list(box)
    if box[1] is not None:
        raise ConfigError(box[1])
    return box[0]


def check_number(accelerator: Accelerator) -> None:
    """Raises ConfigError if WORLD_SIZE promises more processes than have found each other."""
    said = os.environ.get("WORLD_SIZE", "")
    if said.isdigit() and int(said) > accelerator.num_processes:
        raise ConfigError(
            f"WORLD_SIZE={said} is set, but this process runs alone or with fewer ({accelerator.num_processes}): each "
            "would train for itself and overwrite the others' files. Start it with `accelerate launch` or torchrun, "
            "which set RANK, LOCAL_RANK and MASTER_ADDR as well; for a run of one process: unset WORLD_SIZE."
        )


@contextmanager
def claimed(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """`folder`, made if need be, for this run alone while it lasts, and seen by all of its processes.

    Raises ConfigError, on all processes, if another live run has it, if it cannot be written to, or if one of the
    processes sees another folder under its name. A killed run's claim ends with its process.
    """
    held: list = []
    try:
        token = by_main(accelerator, lambda: _claim(folder, held))
        _check_shared(accelerator, folder, token)
        yield
    finally:
        for file, made in held:
            (folder / LOCK).unlink(missing_ok=True)
            file.close()
            if made:
                with contextlib.suppress(OSError):  # a run that ended before it wrote anything leaves no folder
                    folder.rmdir()


def _claim(folder: Path, held: list) -> str:
    """Locks `folder` and puts (lock file, whether the folder is new) into `held`; returns the token that is in it."""
    made, token = not folder.exists(), secrets.token_hex(8)
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T"), "token": token}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder)
        held.append((file, made))
        file.truncate(0)
        file.write(json.dumps(about))
        file.flush()
    except OSError as error:
        raise ConfigError(f"`output_dir={folder}` cannot be written to ({error.strerror or error}).") from error
    return token


def _locked(folder: Path):
    """The open lock file of `folder`. The system frees it when the process ends, however it ends."""
    path = folder / LOCK
    while True:
        file = path.open("a+", encoding="utf-8")
        if not _lock(file):
            file.seek(0)
            text = file.read()
            file.close()
            about = json.loads(text) if text.startswith("{") and text.endswith("}") else {}
            raise ConfigError(
                f"{folder} belongs to a run that is still alive (process {about.get('pid', 'unknown')} on "
                f"{about.get('host', 'unknown')}, since {about.get('since', 'just now')}). Two runs would overwrite "
                "each other: end that one, or choose another `output_dir`. Start several processes of one run "
                "with `accelerate launch` or torchrun."
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its owner ended and removed it in between


def _lock(file) -> bool:
    """False if another process holds it; True as well where the system or the disk knows no locks."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _check_shared(accelerator: Accelerator, folder: Path, token: str) -> None:
    """ConfigError on all processes if one of them does not see the main process's lock file in `folder`."""
    end, seen = time.monotonic() + PATIENCE, False
    while not seen:
        with contextlib.suppress(OSError):
            seen = token in (folder / LOCK).read_text(encoding="utf-8")
        if seen or time.monotonic() > end:
            break
        time.sleep(0.1)
    blind = gather_object([None if seen else f"{accelerator.process_index} on {socket.gethostname()}"])
    blind = [who for who in blind if who]
    if blind:
        raise ConfigError(
            f"Process {', '.join(blind)} does not see the folder `output_dir={folder}` of the main process: a "
            "checkpoint would come out in parts that nothing can read. Give a path on a disk that all machines share."
        )
