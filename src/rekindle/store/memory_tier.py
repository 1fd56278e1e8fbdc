"""The host-memory tier's books: what is there, who leases it, and what is packed or goes when the budget is short.

Bytes in use belong to their users' budgets; only those that nobody works with count here, so that memory is counted
once. When they exceed the budget, they are packed, one object after the other, and only then dropped. An object that is
being packed can be leased meanwhile; one that is packed is leased once it was unpacked, or as it is.

Objects whose users have them in memory of their own (adapters in a page pool) are here by name. When the last of these
lets go of one, it is read from its file again and kept, if there is room for it among what is worth more.

Knows neither processes nor descriptors: the memory of an object is whatever `handle` stands for, handed back when it
goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rekindle.clock import Clock
from rekindle.protocol.tiers import Hold, Publish, Resident, Snapshot

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
    """One object; `handle` is None while host memory has none of its bytes. `reasons` is empty until packing it was
    considered. While it `is_moving` somebody reads, packs or unpacks it."""

    made: Publish | Hold
    handle: H | None
    kept_bytes: int
    num_leases: int = 0
    idle_since_s: float = 0.0
    is_packed: bool = False
    is_moving: bool = False
    reasons: tuple[str, ...] = field(default=())

    @property
    def path(self) -> str | None:
        """Where it can be read again; None for what only its maker can make."""
        return self.made.path if isinstance(self.made, Hold) else None

    @property
    def is_loose(self) -> bool:
        """Whether nobody works with its bytes here."""
        return self.handle is not None and (not self.num_leases or self.path is not None)

    @property
    def is_wanted_back(self) -> bool:
        """Whether it could be read from its file, to be kept."""
        return self.handle is None and not self.num_leases and not self.is_moving

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
        """The object of that name, if some of its bytes are here; counts as a hit or a miss."""
        found = self._objects.get(name)
        if found is not None and found.handle is None:
            found = None
        self._counts["misses" if found is None else "hits"] += 1
        return found

    def publish(self, made: Publish, handle: H) -> bool:
        """Take a new object in, leased by its maker; False, and nothing taken, if there is one of that name."""
        if made.name in self._objects:
            return False
        self._objects[made.name] = TierObject(made, handle, made.num_bytes, num_leases=1)
        return True

    def hold(self, made: Hold) -> None:
        """Somebody has this object in memory of its own."""
        held = self._objects.setdefault(made.name, TierObject(made, None, 0))
        held.num_leases += 1

    def release(self, leases: Counter[str]) -> None:
        """Give leases back, by name how many."""
        for name, count in leases.items():
            held = self._objects[name]
            held.num_leases -= count
            if not held.num_leases:
                held.idle_since_s = self._clock.monotonic_s()

    def lose(self, name: str) -> None:
        """What is here of an object with a file of its own is damaged, and is dropped."""
        held = self._objects.get(name)
        if held is not None and held.path is not None and not held.is_moving:
            self._lose_copy(held)

    def fit(self) -> TierObject[H] | None:
        """Drop what is loose beyond the budget, as far as packing cannot do; returns what to move next, if anything and
        if nothing is under way: an object to be packed, or, if it has no handle, to be read from its file. The caller
        does it and says `packed`, `left_plain`, `kept` or `not_kept`."""
        if any(held.is_moving and not held.is_packed for held in self._objects.values()):
            return None
        while self._loose_bytes() > self._budget_bytes:
            loose = self._in_order(held for held in self._objects.values() if held.is_loose and not held.is_moving)
            if not loose:
                return None
            copy = next((held for held in loose if held.num_leases), None)
            if copy is not None:
                self._lose_copy(copy)
                continue
            hopeless = [held for held in loose if LEAST_SHARE * held.kept_bytes > self._budget_bytes]
            packable = next((held for held in loose if held.may_be_packed), None)
            if packable is not None and not hopeless:
                packable.is_moving = True
                return packable
            self.discard((hopeless or loose)[0])
        wanted = self._worth_reading()
        if wanted is not None:
            wanted.is_moving = True
        return wanted

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
        """An object is not to be packed, for these reasons; without any, it was leased before it was."""
        held.is_moving = False
        held.reasons = reasons

    def unpacked(self, held: TierObject[H], handle: H) -> None:
        """An object was unpacked."""
        held.is_moving = False
        self._counts["unpacks"] += 1
        self._replace(held, handle, held.made.num_bytes, is_packed=False)
        held.idle_since_s = self._clock.monotonic_s()

    def kept(self, held: TierObject[H], handle: H) -> None:
        """An object was read from its file; if somebody has it again, that was in vain."""
        held.is_moving = False
        if held.num_leases:
            self._drop(handle)
            return
        self._counts["reads"] += 1
        self._replace(held, handle, held.made.num_bytes, is_packed=False)

    def not_kept(self, held: TierObject[H]) -> None:
        """An object was not read from its file."""
        held.is_moving = False
        if not held.num_leases:
            del self._objects[held.made.name]

    def discard(self, held: TierObject[H]) -> None:
        """Drop an object that nobody leases."""
        del self._objects[held.made.name]
        self._lose_copy(held)
        self._counts["evictions"] += 1

    def snapshot(self) -> Snapshot:
        """All of it as of now."""
        residents = tuple(self._resident(held) for held in self._objects.values())
        totals = (self._counts[name] for name in ("hits", "misses", "evictions", "packs", "unpacks", "reads"))
        return Snapshot(self._budget_bytes, self._loose_bytes(), residents, *totals)

    def _worth_reading(self) -> TierObject[H] | None:
        """The most valuable object to be read from its file; those that would not stay are forgotten."""
        if not any(held.is_wanted_back for held in self._objects.values()):
            return None
        wanted, room = None, float(self._budget_bytes)
        idle = [it for it in self._objects.values() if not it.num_leases and not it.is_moving]
        for held in reversed(self._in_order(idle)):
            may_shrink = held.is_wanted_back or held.may_be_packed
            room -= LEAST_SHARE * held.made.num_bytes if may_shrink else held.kept_bytes
            if not held.is_wanted_back:
                continue
            if room >= 0:
                wanted = wanted or held
            else:
                room += LEAST_SHARE * held.made.num_bytes
                del self._objects[held.made.name]
        return wanted

    def _in_order(self, objects: Iterable[TierObject[H]]) -> list[TierObject[H]]:
        """What is to go first first."""
        return [self._objects[name] for name in self._order([self._resident(held) for held in objects])]

    def _lose_copy(self, held: TierObject[H]) -> None:
        if held.handle is not None:
            self._replace(held, None, 0, is_packed=False)

    def _replace(self, held: TierObject[H], handle: H | None, kept_bytes: int, *, is_packed: bool) -> None:
        if held.handle is not None:
            self._drop(held.handle)
        held.handle, held.kept_bytes, held.is_packed, held.reasons = handle, kept_bytes, is_packed, ()

    def _resident(self, held: TierObject[H]) -> Resident:
        return Resident(
            name=held.made.name,
            num_bytes=held.made.num_bytes,
            kept_bytes=held.kept_bytes,
            num_leases=held.num_leases,
            idle_s=0.0 if held.num_leases else self._clock.monotonic_s() - held.idle_since_s,
            is_packed=held.is_packed,
            reasons=held.reasons,
            is_elsewhere=held.path is not None,
        )

    def _loose_bytes(self) -> int:
        return sum(held.kept_bytes for held in self._objects.values() if held.is_loose)
