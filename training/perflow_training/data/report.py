"""Counts of what was used and what was left out, and the error when most of it cannot be used."""

from collections import Counter
from dataclasses import dataclass

from perflow_diffusers.words.shown import shown
from perflow_training.errors import DataError

FIRST = 200  # examples after which a bad dataset is recognised at the latest
#: the fields of DataReport that count what was left out
FAILURES = ("missing_captions", "unreadable_captions", "unreadable", "too_small", "broken")
IN_A_ROW = 5000  # unusable examples in a row after which something must be wrong (a disk that went away)


@shown
@dataclass(frozen=True)
class DataReport:
    """What one process has seen so far, over all epochs.

    `missing_captions`, `unreadable_captions` (no UTF-8 text), `unreadable` (no picture by its header) and `too_small`
    pictures (`min_image_size`) are noticed by every process and left out of the order. `broken` pictures (a good
    header, bad pixels) are noticed by the process that decodes them, and the next good picture of the global batch
    stands in for each.
    """

    epoch: int = 0
    used: int = 0
    missing_captions: int = 0
    unreadable_captions: int = 0
    unreadable: int = 0
    too_small: int = 0
    broken: int = 0
    reasons: tuple[tuple[str, int], ...] = ()  # most frequent first
    example: str = ""  # the first that could not be used, and why

    @property
    def corrupt(self) -> int:
        """Pictures that could not be used, for whichever reason."""
        return self.unreadable + self.broken

    def __str__(self) -> str:
        text = (
            f"data: {self.used} examples used, {self.missing_captions} missing captions, "
            f"{self.unreadable_captions} unreadable captions, {self.corrupt} corrupt images, "
            f"{self.too_small} small images"
        )
        return f"{text} (first: {self.example})" if self.example else text


@dataclass(frozen=True)
class Failure:
    """Why an example cannot be used; `kind` is the field of DataReport that counts it."""

    kind: str
    reason: str
    name: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class FailureLimit:
    """Counts good and bad examples in the order of reading, and raises DataError when most of them are bad.

    The first 200 examples (or all, where there are fewer: `total`, else `end()` at the end of an epoch) are looked at.
    """

    def __init__(self, total: int | None = None):
        self.tried = 0
        self.in_a_row = 0
        self.failed: Counter[str] = Counter()
        self.example: Failure | None = None
        self.first = FIRST if total is None else min(FIRST, total)

    def add(self, failure: Failure | None) -> None:
        self.tried += 1
        self.in_a_row = 0 if failure is None else self.in_a_row + 1
        if failure is None:
            return
        self.failed[failure.reason] += 1
        self.example = self.example or failure
        if self.tried <= self.first and 2 * self.failed.total() > self.first:
            self._fail(f"{self.failed.total()} of the first {self.tried} examples")
        if self.in_a_row >= IN_A_ROW:
            self._fail(f"{self.in_a_row} examples in a row")

    def end(self) -> None:
        """Called where the source ends: a short one is judged by all of it."""
        if not self.tried:
            raise DataError("The source of examples is empty. Look at its files, split and column names.")
        if self.tried <= self.first and 2 * self.failed.total() > self.tried:
            self._fail(f"{self.failed.total()} of all {self.tried} examples")

    def _fail(self, what: str) -> None:
        counts = ", ".join(f"{count} x {reason}" for reason, count in self.failed.most_common(5))
        raise DataError(f"{what} cannot be used: {counts}. The first is {self.example}.")
