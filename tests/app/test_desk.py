"""The desk: one thread, windows in turn, the newest wish of each."""

import threading
import time

from perflow_diffusers.app.desk import Desk
from perflow_diffusers.app.drawing import Interrupted


class Drawer:
    """Work of so many steps; notes who is inside."""

    def __init__(self, steps=4, pause=0.002):
        self.steps, self.pause = steps, pause
        self.inside, self.most, self.started, self.finished = 0, 0, [], []
        self.threads = set()

    def work(self, name, stages=1):
        def work(cancelled):
            for stage in range(stages):
                self.inside += 1
                self.most = max(self.most, self.inside)
                self.threads.add(threading.get_ident())
                self.started.append((name, stage))
                try:
                    for step in range(self.steps):
                        time.sleep(self.pause)
                        if cancelled(step + 1, self.steps):
                            raise Interrupted
                finally:
                    self.inside -= 1
                self.finished.append((name, stage))
                yield ("picture", (name, stage))

        return work


def held(desk):
    """Keeps the desk busy until it is released."""
    release, begun = threading.Event(), threading.Event()

    def work(cancelled):
        begun.set()
        release.wait(10)
        yield ("picture", None)

    ticket = desk.submit("holder", work)
    begun.wait(10)
    return release, ticket


def test_of_fifty_wishes_the_last_is_drawn_and_never_more_than_one_waits():
    desk, drawer = Desk(), Drawer()
    tickets = []
    for number in range(50):
        tickets.append(desk.submit("window", drawer.work(number)))
        assert desk.behind("window") <= 1 + 1  # one in work that may be past its middle, one waiting
        time.sleep(0.003)
    assert list(tickets[-1]) == [("picture", (49, 0))]
    assert all(list(ticket)[-1][0] in ("picture", "superseded") for ticket in tickets[:-1])
    assert desk.behind("window") == 0
    desk.close()


def test_an_interrupted_picture_ends_within_one_step():
    desk, drawer = Desk(), Drawer(steps=1000, pause=0.002)
    first = desk.submit("window", drawer.work("first"))
    while not drawer.started:
        time.sleep(0.001)
    small = Drawer(steps=1)
    assert list(desk.submit("window", small.work("second"))) == [("picture", ("second", 0))]
    assert list(first) == [("superseded", None)] and drawer.finished == []
    desk.close()


def test_a_first_picture_past_its_middle_is_finished_and_its_comparison_is_not_begun():
    desk = Desk()
    reached, go = threading.Event(), threading.Event()

    def work(cancelled):
        assert not cancelled(1, 4)
        reached.set()
        go.wait(10)
        if cancelled(2, 4):
            raise Interrupted
        yield ("picture", "first")
        yield ("comparison", "never")

    first = desk.submit("window", work)
    reached.wait(10)
    second = desk.submit("window", Drawer(steps=1).work("second"))
    go.set()
    assert list(first) == [("picture", "first"), ("superseded", None)]
    assert list(second) == [("picture", ("second", 0))]
    desk.close()


def test_one_thread_draws_and_windows_take_turns():
    desk, drawer = Desk(), Drawer()
    release, _ = held(desk)
    tickets = [desk.submit(f"window {number}", drawer.work(number, stages=2)) for number in range(4)]
    release.set()
    for ticket in tickets:
        assert [kind for kind, _ in ticket] == ["picture", "picture"]
    assert drawer.most == 1 and len(drawer.threads) == 1 and threading.get_ident() not in drawer.threads
    # every window's first picture comes before any window's second
    assert drawer.finished == [(number, stage) for stage in (0, 1) for number in range(4)]
    desk.close()


def test_a_newer_wish_keeps_the_place_of_the_older_and_does_not_starve_others():
    desk, drawer = Desk(), Drawer(steps=1)
    release, _ = held(desk)
    desk.submit("typing", drawer.work("old"))
    other = desk.submit("other", drawer.work("other"))
    typing = desk.submit("typing", drawer.work("new"))
    release.set()
    assert list(other) and list(typing)
    assert [name for name, _ in drawer.finished] == ["new", "other"]
    desk.close()


def test_a_window_that_leaves_frees_its_place():
    desk, drawer = Desk(), Drawer(steps=1000)
    ticket = desk.submit("window", drawer.work("endless"))
    while not drawer.started:
        time.sleep(0.001)
    release_waiting = desk.submit("waiting", drawer.work("never"))
    desk.leave("window")
    desk.leave("waiting")
    assert list(ticket) == [("superseded", None)] and list(release_waiting) == [("superseded", None)]
    assert drawer.finished == []
    desk.close()


def test_an_error_is_a_sentence_and_the_thread_lives():
    desk = Desk()

    def bad(cancelled):
        raise ValueError("The prompt is too long.")
        yield

    assert list(desk.submit("window", bad)) == [("failed", "The prompt is too long.")]
    assert list(desk.submit("window", Drawer(steps=1).work(1))) == [("picture", (1, 0))]
    desk.close()


def test_closing_ends_everybody():
    desk, drawer = Desk(), Drawer(steps=1000)
    tickets = [desk.submit(name, drawer.work(name)) for name in ("a", "b", "c")]
    desk.close()
    assert [list(ticket) for ticket in tickets] == [[("superseded", None)]] * 3
    assert not desk._thread.is_alive()
