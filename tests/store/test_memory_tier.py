"""The books of the host-memory tier."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rekindle.clock import ManualClock
from rekindle.store.memory_tier import MemoryTier


class Tier:
    """A tier of 100 bytes whose handles are names, and what it dropped."""

    def __init__(self, budget_bytes: int = 100) -> None:
        self.clock = ManualClock()
        self.dropped: list[str] = []
        self.books: MemoryTier[str] = MemoryTier(budget_bytes, self.clock, self.dropped.append)

    def release(self, *names: str) -> None:
        self.clock.advance(1.0)
        self.books.release(Counter(names))


def test_what_was_published_is_leased_by_others_and_stays_while_it_is():
    tier = Tier(budget_bytes=0)
    assert tier.books.lease("a") is None
    assert tier.books.publish("a", "memory of a", 60)
    assert tier.books.lease("a") == ("memory of a", 60)
    tier.release("a")
    assert tier.dropped == []
    tier.release("a")
    assert tier.dropped == ["memory of a"]
    assert tier.books.lease("a") is None


def test_a_second_object_of_a_name_is_not_taken():
    tier = Tier()
    assert tier.books.publish("a", "first", 60)
    assert not tier.books.publish("a", "second", 60)
    assert tier.books.lease("a") == ("first", 60)


def test_idle_objects_are_kept_within_the_budget_and_the_longest_idle_goes_first():
    tier = Tier()
    for name in "abc":
        tier.books.publish(name, name, 40)
    tier.release("b")
    tier.release("a")
    assert tier.dropped == []
    tier.release("c")
    assert tier.dropped == ["b"]
    assert {resident.name for resident in tier.books.snapshot().objects} == {"a", "c"}


def test_an_object_larger_than_the_budget_is_never_kept_idle_and_costs_no_other():
    tier = Tier()
    tier.books.publish("small", "small", 40)
    tier.books.publish("huge", "huge", 1000)
    tier.release("small")
    tier.release("huge")
    assert tier.dropped == ["huge"]


def test_objects_in_use_do_not_count_against_the_budget():
    tier = Tier()
    tier.books.publish("used", "used", 1000)
    tier.books.publish("idle", "idle", 100)
    tier.release("idle")
    assert tier.dropped == []
    snapshot = tier.books.snapshot()
    assert snapshot.idle_bytes == 100
    assert {(it.name, it.num_leases) for it in snapshot.objects} == {("used", 1), ("idle", 0)}


@given(st.lists(st.tuples(st.sampled_from(["lease", "publish", "release"]), st.sampled_from("abcdef")), max_size=60))
def test_leases_pin_and_the_budget_holds_whatever_is_done(operations: list[tuple[str, str]]) -> None:
    tier = Tier()
    held: Counter[str] = Counter()
    sizes = {name: 15 * (index + 1) for index, name in enumerate("abcdef")}
    for operation, name in operations:
        if operation == "lease":
            held[name] += tier.books.lease(name) is not None
        elif operation == "publish":
            held[name] += tier.books.publish(name, name, sizes[name])
        elif held[name]:
            held[name] -= 1
            tier.release(name)
        snapshot = tier.books.snapshot()
        present = {it.name: it for it in snapshot.objects}
        assert all(present[name].num_leases == count for name, count in held.items() if count)
        idle_bytes = sum(it.num_bytes for it in snapshot.objects if not it.num_leases)
        assert idle_bytes == snapshot.idle_bytes <= 100
