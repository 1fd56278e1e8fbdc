"""In which order idle memory is given up: by the time to bring it back, times the chance of its use, per byte.

The chance of use is a rate that decays exponentially with the same time constant for everything, and each use adds to
it. All rates therefore fall alike, and their order changes with uses only. `warmth` is the logarithm of a rate without
what time takes from all: a number that stays true until the next use. The logarithm of a value is the sum of a warmth
and of the logarithm of a price, seconds per byte, so an order by value can be kept in a heap and needs no scan.

Past uses foretell further ones better for some kinds of things than for others: most prompts never come again, most
adapters do. A `ReuseShare` for each kind, learnt from what happens, scales the rates of its things.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

DECAY_S = 300.0
"""Time in which a rate of use falls to 1/e: demand in a serverless replica comes in spells of minutes."""

COLD = -math.inf
"""The warmth of what was never used."""

_FEW_STALE = 64
_LEAST_PRICE = 1e-30
_LEAST_SHARE = 1e-3
_SHARE_MEMORY = 0.999
"""The weight of all earlier uses after each new one: those of the last thousand count most."""

Key = TypeVar("Key")


def warmth_after_use(warmth: float, now_s: float) -> float:
    """The warmth of what had `warmth` and is used at `now_s`."""
    now = now_s / DECAY_S
    return now + math.log1p(math.exp(warmth - now))


def warmth_of_rate(uses_per_s: float, now_s: float) -> float:
    """The warmth that stands at `now_s` for that many uses a second."""
    return now_s / DECAY_S + math.log(uses_per_s * DECAY_S)


def log_price(seconds: float, num_bytes: int) -> float:
    """The logarithm of what a byte costs that takes part in being brought back for so many seconds."""
    return math.log(max(seconds / num_bytes, _LEAST_PRICE))


class ReuseShare:
    """The share of uses of a kind of things that were not the first: a mean that forgets."""

    def __init__(self) -> None:
        self._share = 0.5

    @property
    def log(self) -> float:
        """Its logarithm, bounded."""
        return math.log(max(self._share, _LEAST_SHARE))

    def note(self, num_first: int, num_again: int) -> None:
        """So many first uses, and so many uses of what was used before."""
        num_uses = num_first + num_again
        if num_uses:
            kept = _SHARE_MEMORY**num_uses
            self._share = kept * self._share + (1 - kept) * num_again / num_uses


class EvictionOrder(Generic[Key]):
    """Idle things with values, lowest value first, and of equal ones those that came first.

    Entries are changed and removed by leaving stale ones in the heap, which are dropped when they come to the top or
    outnumber the others: each change costs the logarithm of the size, amortised.
    """

    def __init__(self) -> None:
        self.num_pages = 0
        self._entries: dict[Key, tuple[float, int, int]] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._num_set = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def num_pages_of(self, key: Key) -> int:
        """Pages of an entry; 0 if there is none."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry[2]

    def set(self, key: Key, value: float, num_pages: int = 1) -> None:
        """Add an entry, or change it."""
        self.discard(key)
        self._num_set += 1
        self._entries[key] = (value, self._num_set, num_pages)
        self.num_pages += num_pages
        heappush(self._heap, (value, self._num_set, key))
        if len(self._heap) > 2 * len(self._entries) + _FEW_STALE:
            self._heap = [(value, stamp, key) for key, (value, stamp, _) in self._entries.items()]
            heapify(self._heap)

    def discard(self, key: Key) -> None:
        """Remove an entry, if there is one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_pages -= entry[2]

    def in_order(self) -> Iterator[tuple[float, Key]]:
        """(value, key) of all entries, lowest first, found as they are asked for: the first k take k log k. Nothing
        may change meanwhile."""
        heap = self._heap
        while heap and not self._is_current(heap[0]):
            heappop(heap)
        frontier = [(heap[0], 0)] if heap else []
        while frontier:
            entry, index = heappop(frontier)
            for child in range(2 * index + 1, min(2 * index + 3, len(heap))):
                heappush(frontier, (heap[child], child))
            if self._is_current(entry):
                yield entry[0], entry[2]

    def _is_current(self, entry: tuple[float, int, Key]) -> bool:
        value, stamp, key = entry
        return self._entries.get(key, (value, 0, 0))[1] == stamp
