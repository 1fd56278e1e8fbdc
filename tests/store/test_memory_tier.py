"""The books of the host-memory tier."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rekindle.clock import ManualClock
from rekindle.protocol.tiers import Publish
from rekindle.store.memory_tier import MemoryTier, TierObject


class Tier:
    """A tier whose handles are names, and what it dropped."""

    def __init__(self, budget_bytes: int = 100) -> None:
        self.clock = ManualClock()
        self.dropped: list[str] = []
        self.books: MemoryTier[str] = MemoryTier(budget_bytes, self.clock, self.dropped.append)

    def publish(self, name: str, num_bytes: int) -> bool:
        return self.books.publish(Publish(name, num_bytes, "BF16", 1.0), name)

    def lease(self, name: str) -> bool:
        """Whether the object could be had at once."""
        found = self.books.find(name)
        if found is None or found.is_packed:
            return False
        found.num_leases += 1
        return True

    def release(self, *names: str) -> None:
        self.clock.advance(1.0)
        self.books.release(Counter(names))

    def pack(self, kept_bytes: int) -> str | None:
        """Pack what the books say, if anything; returns its name."""
        held = self.books.fit()
        if held is None:
            return None
        self.books.packed(held, f"packed {held.made.name}", kept_bytes, ("worth it",))
        return held.made.name

    def refuse(self) -> str | None:
        """As `pack`, where packing does not pay."""
        held = self.books.fit()
        if held is None:
            return None
        self.books.left_plain(held, ("not worth it",))
        return held.made.name

    def names(self) -> dict[str, bool]:
        """Objects, and whether they are packed."""
        return {resident.name: resident.is_packed for resident in self.books.snapshot().objects}


def test_what_was_published_is_leased_by_others_and_stays_while_it_is() -> None:
    tier = Tier(budget_bytes=0)
    assert not tier.lease("a")
    assert tier.publish("a", 60)
    assert tier.lease("a")
    tier.release("a")
    assert tier.books.fit() is None
    assert tier.dropped == []
    tier.release("a")
    assert tier.books.fit() is None
    assert tier.dropped == ["a"]
    snapshot = tier.books.snapshot()
    assert (snapshot.hits_total, snapshot.misses_total, snapshot.evictions_total) == (1, 1, 1)


def test_a_second_object_of_a_name_is_not_taken() -> None:
    tier = Tier()
    assert tier.publish("a", 60)
    assert not tier.publish("a", 70)
    assert tier.books.snapshot().objects[0].num_bytes == 60


def test_idle_objects_beyond_the_budget_are_packed_the_longest_idle_first() -> None:
    tier = Tier()
    for name in "abc":
        tier.publish(name, 40)
    tier.release("b")
    tier.release("a")
    assert tier.pack(20) is None
    tier.release("c")
    assert tier.pack(20) == "b"
    assert tier.pack(20) is None
    assert tier.names() == {"a": False, "b": True, "c": False}
    assert tier.dropped == ["b"]
    assert tier.books.snapshot().idle_bytes == 100


def test_what_packing_cannot_fit_goes_the_longest_idle_first() -> None:
    tier = Tier()
    for name in "abcd":
        tier.publish(name, 60)
        tier.release(name)
    while tier.pack(45) is not None:
        pass
    assert tier.names() == {"c": True, "d": True}
    assert tier.books.snapshot().evictions_total == 2


def test_objects_that_do_not_pack_well_are_dropped_and_say_why() -> None:
    tier = Tier()
    for name in "ab":
        tier.publish(name, 60)
        tier.release(name)
    assert tier.refuse() == "a"
    assert tier.books.snapshot().objects[0].reasons == ("not worth it",)
    assert tier.refuse() == "b"
    assert tier.refuse() is None
    assert tier.names() == {"b": False}


def test_an_object_far_beyond_the_budget_is_never_kept_idle_and_costs_no_other() -> None:
    tier = Tier()
    tier.publish("small", 40)
    tier.publish("huge", 1000)
    tier.release("small")
    tier.release("huge")
    assert tier.books.fit() is None
    assert tier.dropped == ["huge"]


def test_objects_in_use_do_not_count_against_the_budget() -> None:
    tier = Tier()
    tier.publish("used", 1000)
    tier.publish("idle", 100)
    tier.release("idle")
    assert tier.books.fit() is None
    assert tier.names() == {"used": False, "idle": False}
    assert tier.books.snapshot().idle_bytes == 100


def test_an_object_leased_while_it_is_packed_stays_as_it_is() -> None:
    tier = Tier()
    for name in "ab":
        tier.publish(name, 60)
        tier.release(name)
    held = tier.books.fit()
    assert held is not None
    assert tier.books.fit() is None
    assert tier.lease(held.made.name)
    tier.books.packed(held, "packed", 30, ())
    assert tier.dropped == ["packed"]
    assert tier.names() == {"a": False, "b": False}
    tier.release(held.made.name)
    assert tier.pack(30) == "b"


def test_an_unpacked_object_can_be_packed_again() -> None:
    tier = Tier(budget_bytes=50)
    tier.publish("a", 60)
    tier.release("a")
    assert tier.pack(40) == "a"
    held = tier.books.find("a")
    assert held is not None
    assert held.is_packed
    held.is_moving = True
    assert tier.books.fit() is None
    tier.books.unpacked(held, "a again")
    assert tier.dropped == ["a", "packed a"]
    assert tier.lease("a")
    tier.release("a")
    assert tier.pack(40) == "a"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["lease", "publish", "release", "begin", "end", "refuse"]), st.sampled_from("abcdef")
        ),
        max_size=60,
    )
)
def test_leases_pin_and_the_budget_holds_whatever_is_done(operations: list[tuple[str, str]]) -> None:
    tier = Tier()
    held: Counter[str] = Counter()
    packing: list[TierObject[str]] = []
    sizes = {name: 15 * (index + 1) for index, name in enumerate("abcdef")}
    for operation, name in operations:
        match operation:
            case "lease":
                held[name] += tier.lease(name)
            case "publish":
                held[name] += tier.publish(name, sizes[name])
            case "release" if held[name]:
                held[name] -= 1
                tier.release(name)
            case "begin" if not packing:
                found = tier.books.fit()
                packing += [] if found is None else [found]
            case "end" if packing:
                moved = packing.pop()
                tier.books.packed(moved, "packed", moved.made.num_bytes * 2 // 3, ())
            case "refuse" if packing:
                tier.books.left_plain(packing.pop(), ("no",))
        present = {it.name: it for it in tier.books.snapshot().objects}
        assert all(
            present[name].num_leases == count and not present[name].is_packed for name, count in held.items() if count
        )
        idle = [it for it in present.values() if not it.num_leases]
        assert sum(it.kept_bytes for it in idle) == tier.books.snapshot().idle_bytes
    while packing or (found := tier.books.fit()) is not None:
        moved = packing.pop() if packing else found
        tier.books.packed(moved, "packed", moved.made.num_bytes * 2 // 3, ())
    assert tier.books.snapshot().idle_bytes <= 100
