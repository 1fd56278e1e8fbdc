"""The host-memory tier's books: what is there, who leases it, and what is packed or goes when the budget is short.

Objects in use belong to their users' budgets; only those that nobody leases count here, so that memory is counted once.
When they exceed the budget, they are packed, one after the other, and only then dropped. An object that is being packed
can be leased meanwhile; one that is packed is leased once it was unpacked.

Knows neither processes nor descriptors: the memory of an object is whatever `handle` stands for, handed back when it
goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rekindle.clock import Clock
from rekindle.protocol.tiers import Publish, Resident, Snapshot

H = TypeVar("H")
Order = Callable[[Sequence[Resident]], Iterable[str]]
"""Names of idle objects, what is to go first first."""

LEAST_SHARE = 0.5
"""Packing makes no weights smaller than that, so what is too large even then is not packed to be kept."""


def least_recently_used(idle: Sequence[Resident]) -> Iterable[str]:
    """The longest idle first."""
    return [resident.name for resident in sorted(idle, key=lambda resident: -resident.idle_s)]


@dataclass(slots=True)
class TierObject(Generic[H]):
    """One object as it lies in memory. `reasons` is empty until packing it was considered."""

    made: Publish
    handle: H
    kept_bytes: int
    num_leases: int = 0
    idle_since_s: float = 0.0
    is_packed: bool = False
    is_moving: bool = False
    reasons: tuple[str, ...] = field(default=())

    @property
    def may_be_packed(self) -> bool:
        return not (self.is_packed or self.reasons)


class MemoryTier(Generic[H]):
    """See the module. `drop` is given handles that are not needed any more."""

    def __init__(
        self, budget_bytes: int, clock: Clock, drop: Callable[[H], object], order: Order = least_recently_used
    ) -> None:
        self._budget_bytes, self._clock, self._drop, self._order = budget_bytes, clock, drop, order
        self._objects: dict[str, TierObject[H]] = {}
        self._counts: Counter[str] = Counter()

    def find(self, name: str) -> TierObject[H] | None:
        """The object of that name; counts as a hit or a miss."""
        found = self._objects.get(name)
        self._counts["misses" if found is None else "hits"] += 1
        return found

    def publish(self, made: Publish, handle: H) -> bool:
        """Take a new object in, leased by its maker; False, and nothing taken, if there is one of that name."""
        if made.name in self._objects:
            return False
        self._objects[made.name] = TierObject(made, handle, made.num_bytes, num_leases=1)
        return True

    def release(self, leases: Counter[str]) -> None:
        """Give leases back, by name how many."""
        for name, count in leases.items():
            held = self._objects[name]
            held.num_leases -= count
            if not held.num_leases:
                held.idle_since_s = self._clock.monotonic_s()

    def fit(self) -> TierObject[H] | None:
        """Drop what is idle beyond the budget, as far as packing cannot do; returns what to pack next, if anything and
        if nothing is being packed yet. The caller packs it and says `packed` or `left_plain`."""
        if any(held.is_moving and not held.is_packed for held in self._objects.values()):
            return None
        while self._idle_bytes() > self._budget_bytes:
            idle = [held for held in self._objects.values() if not held.num_leases and not held.is_moving]
            if not idle:
                return None
            hopeless = [held for held in idle if LEAST_SHARE * held.kept_bytes > self._budget_bytes]
            by_name = {held.made.name: held for held in idle}
            ordered = [by_name[name] for name in self._order([self._resident(held) for held in idle])]
            packable = [held for held in ordered if held.may_be_packed and held not in hopeless]
            if packable and not hopeless:
                packable[0].is_moving = True
                return packable[0]
            self.discard((hopeless or ordered)[0])
        return None

    def packed(self, held: TierObject[H], handle: H, kept_bytes: int, reasons: tuple[str, ...]) -> None:
        """An object was packed; if it was leased meanwhile, it stays as it is."""
        held.is_moving = False
        if held.num_leases:
            self._drop(handle)
            return
        self._counts["packs"] += 1
        self._replace(held, handle, kept_bytes, is_packed=True)
        held.reasons = reasons

    def left_plain(self, held: TierObject[H], reasons: tuple[str, ...]) -> None:
        """An object is not to be packed, for these reasons."""
        held.is_moving = False
        held.reasons = reasons

    def unpacked(self, held: TierObject[H], handle: H) -> None:
        """An object was unpacked."""
        held.is_moving = False
        self._counts["unpacks"] += 1
        self._replace(held, handle, held.made.num_bytes, is_packed=False)
        held.reasons = ()
        held.idle_since_s = self._clock.monotonic_s()

    def discard(self, held: TierObject[H]) -> None:
        """Drop an object that nobody leases."""
        del self._objects[held.made.name]
        self._drop(held.handle)
        self._counts["evictions"] += 1

    def snapshot(self) -> Snapshot:
        """All of it as of now."""
        residents = tuple(self._resident(held) for held in self._objects.values())
        totals = (self._counts[name] for name in ("hits", "misses", "evictions", "packs", "unpacks"))
        return Snapshot(self._budget_bytes, self._idle_bytes(), residents, *totals)

    def _replace(self, held: TierObject[H], handle: H, kept_bytes: int, *, is_packed: bool) -> None:
        self._drop(held.handle)
        held.handle, held.kept_bytes, held.is_packed = handle, kept_bytes, is_packed

    def _resident(self, held: TierObject[H]) -> Resident:
        idle_s = 0.0 if held.num_leases else self._clock.monotonic_s() - held.idle_since_s
        made = held.made
        return Resident(
            made.name, made.num_bytes, held.kept_bytes, held.num_leases, idle_s, held.is_packed, held.reasons
        )

    def _idle_bytes(self) -> int:
        return sum(held.kept_bytes for held in self._objects.values() if not held.num_leases)
