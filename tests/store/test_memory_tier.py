"""The books of the host-memory tier."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rekindle.clock import ManualClock
from rekindle.protocol.tiers import Hold, Publish
from rekindle.store.memory_tier import MemoryTier, TierObject


class Tier:
    """A tier whose handles are names, and what it dropped."""

    def __init__(self, budget_bytes: int = 100) -> None:
        self.clock = ManualClock()
        self.dropped: list[str] = []
        self.books: MemoryTier[str] = MemoryTier(budget_bytes, self.clock, self.dropped.append)
        self.num_made = 0

    def publish(self, name: str, num_bytes: int) -> bool:
        return self.books.publish(Publish(name, num_bytes, "BF16", 1.0), name)

    def new_handle(self) -> str:
        self.num_made += 1
        return f"handle {self.num_made}"

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
        held = self.next_to_pack()
        if held is None:
            return None
        self.books.packed(held, f"packed {held.made.name}", kept_bytes, ("worth it",))
        return held.made.name

    def refuse(self) -> str | None:
        """As `pack`, where packing does not pay."""
        held = self.next_to_pack()
        if held is None:
            return None
        self.books.left_plain(held, ("not worth it",))
        return held.made.name

    def next_to_pack(self) -> TierObject[str] | None:
        held = self.books.fit()
        assert held is None or held.handle is not None
        return held

    def hold(self, name: str, num_bytes: int) -> None:
        """Somebody has an object with a file in memory of its own."""
        self.books.hold(Hold(name, num_bytes, "BF16", 1.0, f"/{name}"))

    def read(self) -> str | None:
        """Read what the books say, if anything; returns its name."""
        held = self.books.fit()
        if held is None:
            return None
        assert held.handle is None
        self.books.kept(held, f"read {held.made.name}")
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
    held = tier.next_to_pack()
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


def test_what_only_its_users_have_cannot_be_leased() -> None:
    tier = Tier()
    tier.hold("a", 60)
    assert not tier.lease("a")
    snapshot = tier.books.snapshot()
    assert (snapshot.idle_bytes, snapshot.hits_total, snapshot.misses_total) == (0, 0, 1)
    (resident,) = snapshot.objects
    assert (resident.kept_bytes, resident.num_leases, resident.is_in_use) == (0, 1, False)
    assert tier.books.fit() is None


def test_what_its_last_user_lets_go_of_is_read_from_its_file_and_kept() -> None:
    tier = Tier()
    tier.hold("a", 60)
    tier.hold("a", 60)
    tier.release("a")
    assert tier.read() is None
    tier.release("a")
    assert tier.read() == "a"
    assert tier.read() is None
    assert tier.lease("a")
    assert tier.books.snapshot().reads_total == 1


def test_a_copy_of_what_is_in_use_elsewhere_counts_and_goes_before_anything_else() -> None:
    tier = Tier()
    tier.hold("used", 60)
    tier.release("used")
    tier.read()
    tier.hold("used", 60)
    assert tier.books.snapshot().idle_bytes == 60
    tier.publish("idle", 60)
    tier.release("idle")
    assert tier.next_to_pack() is None
    assert tier.dropped == ["read used"]
    assert tier.books.snapshot().idle_bytes == 60
    tier.release("used")
    assert tier.read() == "used"


def test_an_object_taken_again_while_it_is_read_is_not_kept() -> None:
    tier = Tier()
    tier.hold("a", 60)
    tier.release("a")
    held = tier.books.fit()
    assert held is not None
    tier.hold("a", 60)
    assert tier.books.fit() is None
    tier.books.kept(held, "read a")
    assert tier.dropped == ["read a"]
    tier.release("a")
    assert tier.read() == "a"


def test_an_object_whose_file_cannot_be_read_is_forgotten() -> None:
    tier = Tier()
    tier.hold("a", 60)
    tier.release("a")
    held = tier.books.fit()
    assert held is not None
    tier.books.not_kept(held)
    assert tier.names() == {}


def test_only_what_would_stay_is_read_the_most_recently_used_first() -> None:
    tier = Tier()
    for name in "abcd":
        tier.hold(name, 80)
    for name in "abcd":
        tier.release(name)
    assert tier.read() == "d"
    assert set(tier.names()) == {"c", "d"}, "two halves of 80 are all that 100 bytes can hold"
    assert tier.read() == "c"
    assert tier.pack(45) == "c"
    assert tier.pack(45) == "d"
    assert tier.read() is None
    assert tier.names() == {"c": True, "d": True}


def test_damaged_bytes_of_what_has_a_file_are_dropped() -> None:
    tier = Tier()
    tier.hold("a", 60)
    tier.release("a")
    tier.read()
    assert tier.lease("a")
    tier.release("a")
    tier.books.lose("a")
    assert tier.dropped == ["read a"]
    assert not tier.lease("a")
    tier.publish("weights", 60)
    tier.books.lose("weights")
    tier.books.lose("unknown")
    assert "weights" in tier.names()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["lease", "take", "publish", "hold", "release", "begin", "end", "refuse"]),
            st.sampled_from("abcdef"),
        ),
        max_size=80,
    )
)
def test_leases_pin_and_the_budget_holds_whatever_is_done(operations: list[tuple[str, str]]) -> None:
    """Of objects a, b and c somebody has files."""
    tier = Tier()
    held: Counter[str] = Counter()
    moves: list[TierObject[str]] = []
    sizes = {name: 15 * (index + 1) for index, name in enumerate("aebfcd")}
    for operation, name in operations:
        match operation:
            case "lease":
                held[name] += tier.lease(name)
            case "take":
                found = tier.books.find(name)
                if found is not None:
                    found.num_leases += 1
                    held[name] += 1
            case "publish" if name in "def":
                handle = tier.new_handle()
                is_taken = tier.books.publish(Publish(name, sizes[name], "BF16", 1.0), handle)
                held[name] += is_taken
                tier.dropped += [] if is_taken else [handle]
            case "hold" if name in "abc":
                tier.hold(name, sizes[name])
                held[name] += 1
            case "release" if held[name]:
                held[name] -= 1
                tier.release(name)
            case "begin" if not moves:
                move = tier.books.fit()
                moves += [] if move is None else [move]
            case "end" if moves:
                finish(tier, moves.pop())
            case "refuse" if moves:
                move = moves.pop()
                if move.handle is None:
                    tier.books.not_kept(move)
                else:
                    tier.books.left_plain(move, ("no",))
        snapshot = tier.books.snapshot()
        present = {it.name: it for it in snapshot.objects}
        for leased, count in held.items():
            if count:
                assert present[leased].num_leases == count
                assert present[leased].is_elsewhere or present[leased].kept_bytes
        assert sum(it.kept_bytes for it in present.values() if not it.is_in_use) == snapshot.idle_bytes
    while moves or (move := tier.books.fit()) is not None:
        finish(tier, moves.pop() if moves else move)
    assert tier.books.snapshot().idle_bytes <= 100
    handles = [it.kept_bytes for it in tier.books.snapshot().objects if it.kept_bytes]
    assert len(set(tier.dropped)) == len(tier.dropped), "a handle was dropped twice"
    assert len(tier.dropped) + len(handles) == tier.num_made


def finish(tier: Tier, held: TierObject[str]) -> None:
    if held.handle is None:
        tier.books.kept(held, tier.new_handle())
    else:
        tier.books.packed(held, tier.new_handle(), held.made.num_bytes * 2 // 3, ("worth it",))
