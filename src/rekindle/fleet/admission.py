"""How many requests a replica holds at once, and when to come back if that is too many."""

from __future__ import annotations

from rekindle.clock import Clock
from rekindle.engine.scheduler.waiting import DepartureRate
from rekindle.errors import Overloaded
from rekindle.protocol.replica import EngineSettings


class Admission:
    """As many requests may be open as an engine may run and twice as many as it may keep waiting. Whom a full queue
    turns away is the engine's choice, which takes that the newcomer reaches it; the bound here is on how many may be
    under way to an engine that is busy or not there."""

    def __init__(self, settings: EngineSettings, clock: Clock) -> None:
        self._max_open = settings.max_sequences + 2 * settings.max_queued
        self._clock = clock
        self._departures = DepartureRate()

    def check(self, num_open: int) -> None:
        """Raise Overloaded, with a time from the rate at which requests ended lately, if no more may be opened."""
        if num_open >= self._max_open:
            raise Overloaded(
                f"{num_open} requests are open and {self._max_open} may be (max_sequences + 2 * max_queued); try again "
                "later, or raise max_queued",
                retry_after_s=self._departures.expected_wait_s(self._clock.monotonic_s()),
            )

    def note_departure(self, num_left: int) -> None:
        """A request has ended, and `num_left` are open."""
        self._departures.note(1, num_left, self._clock.monotonic_s())
