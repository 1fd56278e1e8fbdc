"""The sequences that wait to be admitted, in the order of their arrival."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter

from rekindle.engine.scheduler.sequence import Sequence

_ARRIVAL = attrgetter("arrival")
_FIRST_GUESS_S = 1.0
_SHORTEST_WAIT_S = 0.1
_LONGEST_WAIT_S = 60.0
_WEIGHT_OF_LATEST = 0.2


class WaitingQueue:
    """A queue that lets sequences leave from any place; one that comes back takes the place of its arrival."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=_ARRIVAL)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; it must be in the queue."""
        del self._sequences[bisect_left(self._sequences, sequence.arrival, key=_ARRIVAL)]


class DepartureRate:
    """How often a place in the queue becomes free: an exponentially weighted mean of the intervals."""

    def __init__(self) -> None:
        self._mean_interval_s = _FIRST_GUESS_S
        self._latest_s: float | None = None

    def note(self, num_departed: int, num_left: int, now_s: float) -> None:
        """At `now_s` sequences left the queue. Intervals count only while others are left to wait."""
        if num_departed and self._latest_s is not None:
            interval_s = (now_s - self._latest_s) / num_departed
            self._mean_interval_s += _WEIGHT_OF_LATEST * (interval_s - self._mean_interval_s)
        if num_departed or not num_left:
            self._latest_s = now_s if num_left else None

    def expected_wait_s(self, now_s: float) -> float:
        """Seconds until a place is likely to be free, within sensible bounds; a queue that stands still counts."""
        since_latest_s = 0.0 if self._latest_s is None else now_s - self._latest_s
        return min(max(self._mean_interval_s, since_latest_s, _SHORTEST_WAIT_S), _LONGEST_WAIT_S)
