"""Who draws next: one thread that alone touches the pipeline, windows in turn, the newest wish of each."""

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from perflow_diffusers.app.drawing import Cancelled, Interrupted
from perflow_diffusers.words.shown import shown

logger = logging.getLogger(__name__)
MAX_WINDOWS = 64  # that wait at once

#: Work in stages: yields (kind, what) after each. Between stages others may be served; it is closed when superseded.
Work = Callable[[Cancelled], Iterator[tuple[str, Any]]]


class DeskError(RuntimeError):
    """Too many windows wait, or the desk is closed."""


@shown
@dataclass
class Ticket:
    """A wish of a window. Iterate over it for its events: (kind, what), until it is done or superseded.

    The desk's own events: ("failed", sentence) and, for one that a newer wish replaced, ("superseded", None).
    """

    window: str
    work: Work
    superseded: bool = False
    gone: bool = False
    shown: bool = False
    stages: Iterator[tuple[str, Any]] | None = None
    events: "queue.SimpleQueue[tuple[str, Any] | None]" = field(default_factory=queue.SimpleQueue)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while (event := self.events.get()) is not None:
            yield event

    def cancelled(self, step: int, steps: int) -> bool:
        """Whether to give the picture up after this step.

        A newer wish interrupts, but a first picture that is past its middle is finished: who types without a pause
        should see pictures all the same. Of a window that has left nothing is finished.
        """
        return self.gone or (self.superseded and (self.shown or 2 * step < steps))


class Desk:
    """One worker thread; `submit` from any thread.

    Of each window only the newest wish waits. Windows are served in turn: a wish that comes while others wait is
    placed behind them, and work of several stages lets a waiting window in between two of them.
    """

    def __init__(self, prepare: Callable[[], None] | None = None) -> None:
        self._waiting: OrderedDict[str, Ticket] = OrderedDict()
        self._current: Ticket | None = None
        self._change = threading.Condition()
        self._closed = False
        self._prepare = prepare
        self._thread = threading.Thread(target=self._work, name="perflow-desk", daemon=True)
        self._thread.start()

    def submit(self, window: str, work: Work) -> Ticket:
        """Draw this for a window, instead of whatever it wished before. Raises DeskError if too many wait."""
        ticket = Ticket(window, work)
        with self._change:
            if self._closed:
                raise DeskError("The server is stopping.")
            if window not in self._waiting and len(self._waiting) >= MAX_WINDOWS:
                raise DeskError(f"{MAX_WINDOWS} windows wait for a picture already. Try again in a moment.")
            self._drop(window)
            self._waiting[window] = ticket  # in the place in the queue that the window has waited in, if it has
            self._change.notify()
        return ticket

    def leave(self, window: str) -> None:
        """The window is closed: nothing is drawn for it any more."""
        with self._change:
            if self._current is not None and self._current.window == window:
                self._current.gone = True
            self._drop(window)
            self._waiting.pop(window, None)

    def behind(self, window: str) -> int:
        """How many wishes of a window wait or are in work."""
        with self._change:
            mine = self._current is not None and self._current.window == window and not self._current.superseded
            return int(mine) + int(window in self._waiting)

    def close(self, timeout: float = 10) -> None:
        """Interrupt what is in work, and end the thread."""
        with self._change:
            self._closed = True
            for window in list(self._waiting):
                self._drop(window)
            self._waiting.clear()
            if self._current is not None:
                self._current.gone = self._current.superseded = True
            self._change.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _drop(self, window: str) -> None:
        """Supersede what a window wished; its place in the queue stays for the one who calls."""
        if self._current is not None and self._current.window == window:
            self._current.superseded = True
        former = self._waiting.get(window)
        if former is not None:
            former.superseded = True
            _end(former)

    def _work(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while True:
            with self._change:
                while not self._waiting and not self._closed:
                    self._change.wait()
                if self._closed:
                    return
                _, ticket = self._waiting.popitem(last=False)
                self._current = ticket
            again = self._stage(ticket)
            with self._change:
                self._current = None
                if again and not (ticket.superseded or ticket.gone):
                    self._waiting[ticket.window] = ticket  # behind those who wait
                elif again:
                    _end(ticket)

    def _stage(self, ticket: Ticket) -> bool:
        """One stage of a ticket; whether there may be another."""
        try:
            if ticket.stages is None:
                ticket.stages = iter(ticket.work(ticket.cancelled))
            event = next(ticket.stages, None)
        except Interrupted:
            _end(ticket)
            return False
        except Exception as error:
            if not isinstance(error, ValueError):
                logger.exception("A picture could not be drawn")
            ticket.events.put(("failed", sentence(error)))
            ticket.events.put(None)
            return False
        if event is None:
            ticket.events.put(None)
            return False
        ticket.shown = True
        ticket.events.put(event)
        return True


def _end(ticket: Ticket) -> None:
    ticket.events.put(("superseded", None))
    ticket.events.put(None)


def sentence(error: BaseException) -> str:
    """What went wrong, in words for a page."""
    text = " ".join(str(error).split())[:600]
    if "out of memory" in text.lower():
        return "The device has not enough memory for this picture. Take a smaller one, or start with --offload model."
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
