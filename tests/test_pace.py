"""How work beside steps gives way to them."""

import threading

import pytest

from rekindle import pace
from rekindle.pace import Pace


class Thread:
    """The processor time and the sleeps of the one thread that works."""

    def __init__(self) -> None:
        self.worked_s = 0.0
        self.slept_s: list[float] = []


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Thread:
    thread = Thread()
    monkeypatch.setattr(pace.time, "thread_time", lambda: thread.worked_s)
    return thread


def test_a_working_thread_gets_its_share_of_the_time_and_no_more(
    thread: Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Pace()
    ours.give_way(is_busy=True)
    monkeypatch.setattr(threading.Event, "wait", lambda _event, seconds: thread.slept_s.append(seconds))
    for _ in range(1000):
        thread.worked_s += 0.00009
        ours.rest()
    assert len(thread.slept_s) == 333
    share = thread.worked_s / (thread.worked_s + sum(thread.slept_s))
    assert share == pytest.approx(pace._SHARE, rel=0.01)


def test_nobody_rests_while_no_step_runs(thread: Thread) -> None:
    ours = Pace()
    for is_busy in (True, True, False, False):
        ours.give_way(is_busy)
    thread.worked_s = 1e6
    ours.rest()  # would take weeks


def test_a_rest_ends_when_the_steps_do(thread: Thread) -> None:
    ours = Pace()
    ours.give_way(is_busy=True)
    thread.worked_s = 1e6
    resting = threading.Thread(target=ours.rest)
    resting.start()
    ours.give_way(is_busy=False)
    resting.join(60)
    assert not resting.is_alive()
