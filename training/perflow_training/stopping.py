"""Signals that tell a run to end: remembered until the running step is over, and agreed on by all processes."""

import contextlib
import logging
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)
#: preemption and schedulers, Ctrl-C, SLURM's --signal=USR1, a lost terminal
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
ELASTIC = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


class Stopped(BaseException):
    """The run ends because of `signal`; not an Exception, for libraries catch those."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)
        self.kept = "Nothing was lost: it had not begun."  # for the last message

    @property
    def code(self) -> int:
        """What a shell calls the end by this signal: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.signal


class Stopping:
    """A context in which SIGNALS raise Stopped at once, or, within `after_the_step`, are remembered in `asked`.

    A signal that the process was started to ignore (nohup) stays ignored. `agreed()` says what any process was told.
    """

    def __init__(self) -> None:
        self.asked, self.waits = 0, False
        self.handlers: dict[int, Any] = {}
        self.device: torch.device | None = None  # of the messages between processes; None: there is one process
        self.speaks = True
        self.pending: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def __enter__(self) -> "Stopping":
        for number in SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                try:
                    self.handlers[number] = signal.signal(number, self._on_signal)
                except ValueError:  # not in the main thread: nothing to listen to
                    break
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers.clear()

    def among(self, processes: int, index: int, device: torch.device) -> None:
        """Says how many processes must agree, and which one this is."""
        self.device, self.speaks = device if processes > 1 else None, index == 0

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Signals are remembered: what runs is not interrupted, and asks `agreed` now and then."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def _on_signal(self, number: int, frame) -> None:
        if not self.waits:
            raise Stopped(number)
        first, self.asked = not self.asked, self.asked or number
        if number == signal.SIGINT:  # by the system itself, for this process may wait for another one
            signal.signal(number, signal.SIG_DFL)
        if signal.Signals(number).name == "SIGHUP":
            _leave_terminal()
        elif first and self.speaks:
            with contextlib.suppress(OSError):  # logging may be what was interrupted
                os.write(2, f"\n{_announcement(number)}\n".encode())

    def agreed(self) -> int:
        """The signal that any process has had, 0 for none: the same on all, which must all call this.

        On a CPU this is one reduction of a single number. On a GPU its result is looked at in the next call, so that
        no step waits for the end of the one before it.
        """
        if self.device is None:
            return self.asked
        flag = torch.full((), self.asked, dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if self.device.type != "cuda":
            return int(flag)
        answer, event = torch.empty((), dtype=torch.int32, pin_memory=True), torch.cuda.Event()
        answer.copy_(flag, non_blocking=True)
        event.record()
        former, self.pending = self.pending, (answer, event)
        if former is None:
            return 0
        former[1].synchronize()
        return int(former[0])


def _leave_terminal() -> None:
    """Sends what would go to a lost terminal nowhere: each line to it would be an error, and end the run unsaved."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)


def _announcement(number: int) -> str:
    """What is said when a signal comes."""
    said = f"{signal.Signals(number).name}: the run ends after this step and saves a checkpoint."
    if number == signal.SIGINT:
        said += " Ctrl-C once more ends it at once, without saving."
    if "TORCHELASTIC_RUN_ID" in os.environ:
        said += (
            f" torchrun and accelerate launch kill it after {os.environ.get(ELASTIC, '30')} s: where a step and a "
            f"checkpoint take longer, set {ELASTIC} (seconds) before the launch."
        )
    return said
