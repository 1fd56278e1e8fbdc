"""The host-memory tier's books: what is there, who leases it, and what goes when the budget is short.

Objects in use belong to their users' budgets; only those that nobody leases count here, so that memory is counted once.
Knows neither processes nor descriptors: the memory of an object is whatever `handle` stands for, handed back when the
object goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rekindle.clock import Clock
from rekindle.protocol.tiers import Resident, Snapshot

H = TypeVar("H")
Order = Callable[[Sequence[Resident]], Iterable[str]]
"""Names of idle objects, what is to go first first."""


def least_recently_used(idle: Sequence[Resident]) -> Iterable[str]:
    """The longest idle first."""
    return [resident.name for resident in sorted(idle, key=lambda resident: -resident.idle_s)]


@dataclass(slots=True)
class _Object(Generic[H]):
    handle: H
    num_bytes: int
    num_leases: int = 0
    idle_since_s: float = 0.0


class MemoryTier(Generic[H]):
    """See the module. `drop` is given the handle of what was evicted."""

    def __init__(
        self, budget_bytes: int, clock: Clock, drop: Callable[[H], object], order: Order = least_recently_used
    ) -> None:
        self._budget_bytes, self._clock, self._drop, self._order = budget_bytes, clock, drop, order
        self._objects: dict[str, _Object[H]] = {}
        self._hits = self._misses = self._evictions = 0

    def lease(self, name: str) -> tuple[H, int] | None:
        """The object and its size, kept until `release`; None if it is not there."""
        found = self._objects.get(name)
        if found is None:
            self._misses += 1
            return None
        self._hits += 1
        found.num_leases += 1
        return found.handle, found.num_bytes

    def publish(self, name: str, handle: H, num_bytes: int) -> bool:
        """Take a new object in, leased by its maker; False, and nothing taken, if there is one of that name."""
        if name in self._objects:
            return False
        self._objects[name] = _Object(handle, num_bytes, num_leases=1)
        return True

    def release(self, leases: Counter[str]) -> None:
        """Give leases back, by name how many; what is idle beyond the budget goes."""
        for name, count in leases.items():
            held = self._objects[name]
            held.num_leases -= count
            if not held.num_leases:
                held.idle_since_s = self._clock.monotonic_s()
        self._fit()

    def snapshot(self) -> Snapshot:
        """All of it as of now."""
        residents = tuple(self._resident(name, held) for name, held in self._objects.items())
        return Snapshot(self._budget_bytes, self._idle_bytes(), residents, self._hits, self._misses, self._evictions)

    def _resident(self, name: str, held: _Object[H]) -> Resident:
        idle_s = 0.0 if held.num_leases else self._clock.monotonic_s() - held.idle_since_s
        return Resident(name, held.num_bytes, held.num_leases, idle_s)

    def _idle_bytes(self) -> int:
        return sum(held.num_bytes for held in self._objects.values() if not held.num_leases)

    def _fit(self) -> None:
        excess = self._idle_bytes() - self._budget_bytes
        if excess <= 0:
            return
        idle = [self._resident(name, held) for name, held in self._objects.items() if not held.num_leases]
        hopeless = [resident.name for resident in idle if resident.num_bytes > self._budget_bytes]
        others = [resident for resident in idle if resident.num_bytes <= self._budget_bytes]
        for name in (*hopeless, *self._order(others)):
            if excess <= 0:
                return
            held = self._objects.pop(name)
            self._drop(held.handle)
            self._evictions += 1
            excess -= held.num_bytes
