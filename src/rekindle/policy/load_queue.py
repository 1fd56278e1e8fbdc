"""Loads that are carried out one after another, and when those under way will have ended.

A load is begun when it is asked for, but starts when the one before has ended. What it takes is reckoned from when
ends are told, or, where somebody has timed it, from that: ends may be told late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, TypeVar

from rekindle.policy.load_estimates import LoadEstimates

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class LoadTiming:
    """How long a load waited for those before it, and what it then took."""

    queued_s: float
    load_s: float


@dataclass(frozen=True, slots=True)
class _Load:
    stage: str
    num_bytes: int
    began_s: float


class LoadQueue(Generic[Key]):
    """Loads under way, in the order they were begun. Those that end teach the `estimates`. Times in seconds; `now_s`
    never falls."""

    def __init__(self, estimates: LoadEstimates) -> None:
        self.estimates = estimates
        self.load_s_total = 0.0
        self.queued_s_total = 0.0
        self.num_begun = 0
        self._under_way: dict[Key, _Load] = {}
        self._last_end_s = -math.inf

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def begin(self, key: Key, stage: str, num_bytes: int, now_s: float) -> None:
        """So many bytes are to come through a stage, after all that is under way."""
        self._under_way[key] = _Load(stage, num_bytes, now_s)
        self.num_begun += 1

    def end(self, key: Key, now_s: float, *, succeeded: bool, timing: LoadTiming | None = None) -> None:
        """A load is over; one that failed teaches nothing."""
        load = self._under_way.pop(key)
        if timing is None:
            started_s = max(load.began_s, self._last_end_s)
            timing = LoadTiming(started_s - load.began_s, now_s - started_s)
        self._last_end_s = min(load.began_s + timing.queued_s + timing.load_s, now_s)
        self.queued_s_total += timing.queued_s
        self.load_s_total += timing.load_s
        if succeeded:
            self.estimates.observe(load.stage, load.num_bytes, timing.load_s)

    def seconds_left(self, now_s: float) -> dict[Key, float]:
        """How long each load under way is likely to take yet, in the order in which they end."""
        left: dict[Key, float] = {}
        end_s = 0.0
        for key, load in self._under_way.items():
            elapsed_s = 0.0 if left else now_s - max(load.began_s, self._last_end_s)
            end_s += max(self.estimates[load.stage].seconds(load.num_bytes) - elapsed_s, 0.0)
            left[key] = end_s
        return left
