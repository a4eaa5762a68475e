"""Global batches sampled from an order, prefetched in threads; each process is given its slice of every batch."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from perflow_diffusers.words.shown import shown
from perflow_training.data.order import Drawn, Order, Ref
from perflow_training.data.report import Failure, FailureLimit
from perflow_training.errors import DataError

T = TypeVar("T")
AHEAD = 2  # batches prepared while one is used


@dataclass(frozen=True)
class Sample:
    """A drawn record and the group (a picture size) that its batch must share."""

    drawn: Drawn
    group: Hashable


@shown
@dataclass
class Plan:
    """A global batch, what was met on the way to it, and the state from which it follows."""

    before: dict
    items: Sequence[Sample]
    failures: list[Failure]
    epoch: int
    own: list[Future] = field(default_factory=list)


class BatchSampler:
    """Sorts what an order draws into groups and gives a batch as soon as one group can fill it.

    What waits in a group at the end of an epoch goes into the next epoch's batches: nothing is dropped or repeated.
    """

    def __init__(self, order: Order, group: Callable[[Drawn], Hashable | Failure], limit: FailureLimit):
        self.order = order
        self.group = group
        self.limit = limit
        self.waiting: dict[Hashable, deque[Sample]] = {}

    def take(self, count: int) -> tuple[list[Sample], list[Failure]]:
        """`count` records of one group, and those met meanwhile that cannot be used."""
        failures: list[Failure] = []
        full = [group for group, queue in self.waiting.items() if len(queue) >= count]
        if full:
            return self._pop(min(full, key=lambda group: self.waiting[group][0].drawn.ref), count), failures
        while True:
            drawn = self.order.draw(self.limit)
            group = self.group(drawn)
            failure = group if isinstance(group, Failure) else None
            self.limit.add(failure)
            if failure is not None:
                failures.append(failure)
                continue
            queue = self.waiting.setdefault(group, deque())
            queue.append(Sample(drawn, group))
            if len(queue) >= count:
                return self._pop(group, count), failures

    def _pop(self, group: Hashable, count: int) -> list[Sample]:
        queue = self.waiting[group]
        taken = [queue.popleft() for _ in range(count)]
        if not queue:
            del self.waiting[group]
        return taken

    def state(self) -> dict:
        refs = sorted(item.drawn.ref for queue in self.waiting.values() for item in queue)
        return {**self.order.identity, "position": list(self.order.state()), "waiting": [list(ref) for ref in refs]}

    def load(self, state: dict) -> None:
        for name, value in self.order.identity.items():
            if state.get(name) != value:
                raise DataError(
                    f"The saved data position belongs to {state.get(name)} {name}, the data now have {value}. Resume "
                    "with the same data and options, or start anew."
                )
        self.order.load(tuple(state["position"]))
        self.waiting = {}
        for drawn in self.order.recall([tuple(ref) for ref in state["waiting"]]):
            group = self.group(drawn)
            if not isinstance(group, Failure):
                self.waiting.setdefault(group, deque()).append(Sample(drawn, group))


class _Now(Executor):
    """Does the work where it is submitted: the executor of `workers=0`."""

    def submit(self, fn, /, *args, **kwargs):
        done: Future = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class Prefetcher(Generic[T]):
    """Global batches of a sampler, with the work for this process's slice done ahead by `workers` threads.

    One more thread draws and groups, so that a slow source does not hold up training. What comes out does not depend
    on the threads.
    """

    def __init__(
        self,
        sampler: BatchSampler,
        work: Callable[[Sequence[Sample], int], T],
        *,
        process_index: int = 0,
        num_processes: int = 1,
        workers: int = 0,
    ):
        if not 0 <= process_index < num_processes:
            raise DataError(f"`process_index={process_index}` must lie in 0..{num_processes - 1}, one a process.")
        self._sampler = sampler
        self._work = work
        self._index = process_index
        self._processes = num_processes
        self._ahead = AHEAD if workers else 0
        self._planner: Executor = ThreadPoolExecutor(1, "data-order") if workers else _Now()
        self._workers: Executor = ThreadPoolExecutor(workers, "data-work") if workers else _Now()
        self._planned: deque[tuple[int, Future[Plan]]] = deque()
        self._closed = threading.Event()

    def next(self, count: int) -> tuple[Plan, list[T]]:
        """The next global batch of `count` times the number of processes, and the work done for this one's slice."""
        if count < 1:
            raise DataError(f"A batch of {count} examples was asked for; it must be at least 1.")
        if self._planned and self._planned[0][0] != count:
            self.load(self.state())
        while len(self._planned) <= self._ahead:
            self._planned.append((count, self._planner.submit(self._plan, count)))
        plan = self._planned[0][1].result()
        done = [future.result() for future in plan.own]
        self._planned.popleft()
        return plan, done

    def _plan(self, count: int) -> Plan:
        if self._closed.is_set():
            raise DataError("The stream of examples is closed.")
        before = self._sampler.state()
        items, failures = self._sampler.take(count * self._processes)
        plan = Plan(before, items, failures, self._sampler.order.epoch)
        own = range(self._index * count, (self._index + 1) * count)
        plan.own = [self._workers.submit(self._work, items, place) for place in own]
        return plan

    def state(self) -> dict:
        """From where the next batch follows: JSON-able, the same on every process."""
        return self._planned[0][1].result().before if self._planned else self._sampler.state()

    def load(self, state: dict) -> None:
        wait([future for _, future in self._planned])
        self._planned.clear()
        self._sampler.load(state)

    def close(self) -> None:
        """Ends the threads; nothing can be drawn afterwards."""
        self._closed.set()
        for executor in (self._planner, self._workers):
            executor.shutdown(wait=True, cancel_futures=True)


def generator_seed(seed: int, purpose: int, ref: Ref) -> list[int]:
    """Entropy for numpy's generators: one stream of random numbers for each purpose and place in the order."""
    return [seed, purpose, *ref]
