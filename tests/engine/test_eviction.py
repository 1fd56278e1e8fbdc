"""What goes first when pages run short: what costs least to bring back, times the chance of its use, per byte."""

import math
import random
from collections import OrderedDict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.engine.scheduler.adapters import Residency
from rekindle.engine.scheduler.eviction import (
    COLD,
    DECAY_S,
    EvictionOrder,
    log_price,
    warmth_after_use,
    warmth_of_rate,
)
from rekindle.engine.scheduler.memory import PageMemory
from rekindle.engine.scheduler.step_times import StepTimes
from rekindle.errors import InternalError
from rekindle.policy.load_estimates import LoadEstimates
from rekindle.protocol.identity import AdapterDigest
from support.scheduling import ELEMENT_BYTES, make_config, make_manifest

PAGE_BYTES = 1 << 20
LOAD_S, PAGE_S = 0.008, 0.001
"""What a load takes in these tests: as much for itself as for eight pages."""


def config(num_pages):
    return replace(make_config(num_pages=num_pages), page_bytes=PAGE_BYTES)


def manifest(name, num_pages):
    return replace(make_manifest(name), num_elements=num_pages * PAGE_BYTES // ELEMENT_BYTES)


class AdapterShelf:
    """Adapters in a pool, used one after another, each loaded when it is absent; adds up what loads take."""

    def __init__(self, num_pages, sizes):
        self.memory = PageMemory(config(num_pages), StepTimes(), LoadEstimates())
        self.sizes = sizes
        self.reload_s = 0.0
        self.now_s = 0.0
        for name, size in sizes.items():
            self.memory.adapters.add(manifest(name, size), "")

    def use(self, name, gap_s=1.0):
        adapters, digest = self.memory.adapters, AdapterDigest(name)
        self.now_s += gap_s
        adapters.reference(digest, self.now_s)
        if adapters.residency(digest) is Residency.ABSENT:
            pages = self.memory.take(self.sizes[name])
            adapters.begin_load(digest, pages, self.now_s)
            self.now_s += (load_s := load_s_of(self.sizes[name]))
            self.reload_s += load_s
            adapters.end_load(digest, self.now_s)
        adapters.pin(digest)
        adapters.unpin(digest)
        adapters.unreference(digest)
        self.memory.check_integrity([])

    @property
    def resident(self):
        return set(self.memory.adapters.resident)


def load_s_of(num_pages):
    return LOAD_S + PAGE_S * num_pages


def reload_s_of_lru(num_pages, sizes, trace):
    """Seconds of loading if the one used longest ago always went first."""
    resident = OrderedDict()
    total_s = 0.0
    for name in trace:
        if name in resident:
            resident.move_to_end(name)
            continue
        while sum(resident.values()) + sizes[name] > num_pages:
            resident.popitem(last=False)
        resident[name] = sizes[name]
        total_s += load_s_of(sizes[name])
    return total_s


@pytest.mark.parametrize("seed", range(3))
def test_a_zipf_trace_of_mixed_sizes_takes_fewer_seconds_of_loading_than_with_least_recently_used(seed):
    chance = random.Random(seed)
    sizes = {f"adapter-{i}": chance.choice([1, 2, 4, 8, 16]) for i in range(100)}
    weights = [1 / (rank + 1) for rank in range(100)]
    trace = chance.choices(list(sizes), weights, k=2000)
    shelf = AdapterShelf(120, sizes)
    for name in trace:
        shelf.use(name)
    assert shelf.reload_s < 0.8 * reload_s_of_lru(120, sizes, trace)


def test_of_adapters_used_alike_the_large_one_goes_because_its_bytes_cost_less_to_bring_back():
    shelf = AdapterShelf(20, {"large": 12, "small": 2, "other": 10})
    for name in ("small", "large", "other"):
        shelf.use(name)
    assert shelf.resident == {"small", "other"}


def test_of_adapters_of_one_size_the_one_used_most_stays():
    shelf = AdapterShelf(8, {"often": 4, "lately": 4, "other": 4})
    for name in ("often", "often", "often", "lately", "other"):
        shelf.use(name)
    assert shelf.resident == {"often", "other"}


def test_an_adapter_that_somebody_waits_for_goes_last_and_only_if_it_need_not_be_kept():
    shelf = AdapterShelf(8, {"awaited": 4, "popular": 4, "other": 4})
    shelf.use("awaited")
    for _ in range(5):
        shelf.use("popular")
    awaited = AdapterDigest("awaited")
    shelf.memory.adapters.reference(awaited, shelf.now_s)
    assert shelf.memory.allocate(5, keep={awaited}) is None
    assert shelf.resident == {"awaited", "popular"}
    assert shelf.memory.allocate(4) is not None
    assert shelf.resident == {"awaited"}
    assert shelf.memory.allocate(4) is not None
    assert shelf.resident == set()


def test_small_adapters_are_spared_if_a_large_one_that_has_to_go_frees_enough():
    shelf = AdapterShelf(12, {"small": 1, "large": 10})
    shelf.use("small")
    for _ in range(100):
        shelf.use("large")
    assert shelf.memory.allocate(9) is not None
    assert shelf.resident == {"small"}


def test_prefix_pages_and_adapters_are_weighed_against_each_other():
    for prompt_token_s, survivor in ((1e-9, {"x"}), (10.0, set())):
        times = StepTimes()
        for num_tokens in (1, 100, 1, 100) * 200:
            times.note(num_tokens, 0, prompt_token_s * num_tokens)
        memory = PageMemory(config(6), times, LoadEstimates())
        digest = AdapterDigest("x")
        memory.adapters.add(manifest("x", 3), "")
        memory.adapters.reference(digest, 0.0)
        memory.adapters.begin_load(digest, memory.take(3), 0.0)
        memory.adapters.end_load(digest, 0.1)
        memory.adapters.unreference(digest)
        pages = memory.take(3)
        for number, page in enumerate(pages):
            assert memory.prefix.insert(bytes([number]), page, pages[number - 1] if number else None)
        memory.prefix.release(pages, 0.0)
        assert memory.allocate(3) is not None
        assert set(memory.adapters.resident) == survivor
        memory.adapters.check_integrity()
        memory.prefix.check_integrity()


@pytest.mark.parametrize(("num_prompts", "resident"), [(10, ()), (10_000, ("x",))])
def test_prompts_that_never_come_again_are_given_up_before_an_adapter_that_is_used_now_and_then(num_prompts, resident):
    """A page of the adapter costs less than a prompt's, and was used less lately."""
    shelf = AdapterShelf(30, {"x": 20})
    memory = shelf.memory
    for number in range(3000):
        if number % 1000 == 0:
            shelf.use("x")
        shelf.now_s += 0.1
        digest = (number % num_prompts).to_bytes(4)
        pages = memory.prefix.match([digest])
        if pages:
            memory.prefix.use(pages)
        else:
            pages = memory.take(1)
            assert memory.prefix.insert(digest, pages[0], None)
        memory.prefix.release(pages, shelf.now_s)
    assert memory.pool.num_free == 0
    assert memory.allocate(1) is not None
    assert memory.adapters.resident == resident


def test_what_is_in_use_cannot_be_evicted():
    shelf = AdapterShelf(8, {"x": 4})
    shelf.use("x")
    shelf.memory.adapters.pin(AdapterDigest("x"))
    with pytest.raises(InternalError, match="adapter x is not idle"):
        shelf.memory.adapters.evict(AdapterDigest("x"))


def test_idle_adapters_are_put_in_order_anew_when_loads_turn_out_to_cost_otherwise():
    """At first a load takes its time whatever its size, so that a small adapter is worth more a byte; when only bytes
    cost, the large one is, which was used later."""
    shelf = AdapterShelf(100, {"small": 1, "large": 40})
    shelf.use("small")
    shelf.use("large", gap_s=150.0)
    adapters = shelf.memory.adapters
    assert [digest for _, digest in adapters.idle.in_order()] == ["large", "small"]
    for number in range(400):
        size = 1 + number % 50
        other = manifest(f"other-{number}", size)
        adapters.add(other, "")
        adapters.begin_load(other.digest, shelf.memory.take(size), shelf.now_s)
        shelf.now_s += 0.01 * size
        adapters.end_load(other.digest, shelf.now_s)
        adapters.evict(other.digest)
    assert [digest for _, digest in adapters.idle.in_order()] == ["small", "large"]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | st.integers(-5, 5)), max_size=300))
def test_an_order_lists_what_is_in_it_lowest_first_whatever_was_changed(changes):
    order: EvictionOrder[str] = EvictionOrder()
    expected: dict[str, int] = {}
    for key, value in changes:
        if value is None:
            order.discard(key)
            expected.pop(key, None)
        else:
            order.set(key, value, num_pages=abs(value) + 1)
            expected.pop(key, None)
            expected[key] = value
        assert [key for _, key in order.in_order()] == sorted(expected, key=expected.__getitem__)
        assert order.num_pages == sum(abs(value) + 1 for value in expected.values())
        assert len(order) == len(expected)


def test_an_order_whose_entries_change_without_end_takes_no_memory():
    order: EvictionOrder[int] = EvictionOrder()
    for number in range(10_000):
        order.set(number % 10, float(number))
    assert len(order._heap) < 200


@given(st.lists(st.floats(0.001, 1000.0), min_size=1, max_size=30), st.floats(0.0, 1000.0))
def test_warmth_is_the_logarithm_of_the_decayed_uses_less_what_time_takes_from_all(gaps, later_s):
    warmth, now_s, uses = COLD, 0.0, []
    for gap in gaps:
        now_s += gap
        uses.append(now_s)
        warmth = warmth_after_use(warmth, now_s)
    now_s += later_s
    decayed = sum(math.exp((use_s - now_s) / DECAY_S) for use_s in uses)
    assert warmth - now_s / DECAY_S == pytest.approx(math.log(decayed), abs=1e-6)
    assert warmth_of_rate(decayed / DECAY_S, now_s) == pytest.approx(warmth, abs=1e-6)


def test_a_price_of_nothing_is_a_price():
    assert log_price(0.0, 100) < log_price(1e-9, 100)
