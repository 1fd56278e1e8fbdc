"""How long adapters take to load: a + b * bytes, fitted to the loads that ended.

Loads are begun when they are planned, but whoever carries them out may take them one after another. What counts is
therefore the time that a load added: from its beginning, or the end of the one before if that came later.
"""

from __future__ import annotations

import math

from rekindle.engine.scheduler.linear_model import LinearModel
from rekindle.protocol.identity import AdapterDigest


class LoadTimes:
    """Loads under way, in the order they were begun, and what those that ended have taught. Times in seconds."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self.num_begun = 0
        self._fit = LinearModel((0.002, 1e-9), (1.0, float(1 << 24)))
        self._under_way: dict[AdapterDigest, tuple[int, float]] = {}
        self._last_end_s = -math.inf

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds of any load, and of each byte."""
        return self._fit.coefficients

    def begin(self, digest: AdapterDigest, num_bytes: int, now_s: float) -> None:
        self._under_way[digest] = (num_bytes, now_s)
        self.num_begun += 1

    def end(self, digest: AdapterDigest, now_s: float, *, succeeded: bool) -> None:
        """A load is over; one that failed teaches nothing."""
        num_bytes, began_s = self._under_way.pop(digest)
        duration_s = now_s - max(began_s, self._last_end_s)
        self._last_end_s = now_s
        self.total_s += duration_s
        if succeeded:
            self._fit.note((1.0, num_bytes), duration_s)

    def load_s(self, num_bytes: int) -> float:
        """How long a load of so many bytes is likely to take by itself."""
        return self._fit.predict((1.0, num_bytes))

    def seconds_left(self, now_s: float) -> dict[AdapterDigest, float]:
        """How long each load under way is likely to take yet, in the order in which they end."""
        left: dict[AdapterDigest, float] = {}
        end_s = 0.0
        for digest, (num_bytes, began_s) in self._under_way.items():
            elapsed_s = 0.0 if left else now_s - max(began_s, self._last_end_s)
            end_s += max(self.load_s(num_bytes) - elapsed_s, 0.0)
            left[digest] = end_s
        return left
