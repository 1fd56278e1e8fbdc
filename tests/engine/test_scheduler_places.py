"""Who keeps a place in a full queue: flows share the places, and nobody more urgent is displaced."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.errors import Overloaded
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.identity import RequestId
from support.scheduling import Replica, make_config, make_request


def flood(replica, tenant, count, **fields):
    for number in range(count):
        replica.submit(make_request(f"{tenant}{number}", tenant=tenant, **fields))


def waiting(replica):
    """(tenant, priority) of every sequence that waits."""
    return {it.request.request_id: (it.request.tenant, it.request.priority) for it in replica.scheduler._queue}


def test_a_newcomer_takes_the_place_of_the_last_of_the_flow_that_holds_most():
    replica = Replica(make_config(max_queued=4))
    flood(replica, "a", 4)
    replica.submit(make_request("b0", tenant="b"))
    assert set(waiting(replica)) == {"a0", "a1", "a2", "b0"}
    (chunk,) = replica.chunks[RequestId("a3")]
    assert chunk.finish_reason is FinishReason.ERROR
    assert "the queue of 4 requests is full" in chunk.error
    assert (chunk.refusal.kind, chunk.refusal.retry_after_s > 0) == ("Overloaded", True)
    replica.submit(make_request("b1", tenant="b"))
    for tenant in "ab":
        with pytest.raises(Overloaded):
            replica.submit(make_request("next", tenant=tenant))
    assert set(waiting(replica)) == {"a0", "a1", "b0", "b1"}
    assert replica.scheduler.stats().refused_full_total == 4
    replica.run()
    for name in ("a0", "a1", "b0", "b1"):
        replica.check_stream(RequestId(name))


def test_nobody_more_urgent_is_displaced():
    replica = Replica(make_config(max_queued=4))
    flood(replica, "a", 4, priority=-1)
    with pytest.raises(Overloaded):
        replica.submit(make_request("b", tenant="b"))
    replica.submit(make_request("c", tenant="c", priority=-1))
    assert set(waiting(replica)) == {"a0", "a1", "a2", "c"}


def test_neither_a_preempted_nor_a_resumed_sequence_is_displaced():
    replica = Replica(make_config(num_pages=8, max_sequences=2, max_queued=2))
    for name in ("old", "new"):
        replica.submit(make_request(name, 4, max_tokens=25, tenant="a"))
    while not replica.plans or not replica.plans[-1].preempted:
        replica.step()
    replica.submit(make_request("resumed", tenant="a", epoch=1))
    assert set(waiting(replica)) == {"new", "resumed"}
    with pytest.raises(Overloaded):
        replica.submit(make_request("b", tenant="b"))
    replica.run()
    replica.check_stream(RequestId("new"))


@settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from("aaaabcd"), st.sampled_from([0, 0, 1])), max_size=60),
    max_queued=st.integers(1, 12),
)
def test_places_are_shared_within_the_bound_whoever_comes(arrivals, max_queued):
    replica = Replica(make_config(max_queued=max_queued))
    for number, (tenant, priority) in enumerate(arrivals):
        before = waiting(replica)
        held = Counter(flow for flow, _ in before.values())
        num_flows = len(held.keys() | {tenant})
        no_more_urgent = Counter(flow for flow, other in before.values() if other >= priority)
        try:
            replica.submit(make_request(f"r{number}", tenant=tenant, priority=priority))
        except Overloaded:
            assert len(before) == max_queued
            assert all(held[flow] <= held[tenant] + 1 for flow in no_more_urgent)
            if no_more_urgent.total() == max_queued:
                assert held[tenant] >= max_queued / num_flows - 1
            continue
        (*displaced,) = before.keys() - waiting(replica).keys()
        assert bool(displaced) == (len(before) == max_queued)
        for name in displaced:
            flow, other = before[name]
            assert other >= priority
            assert held[flow] >= held[tenant] + 2
            if no_more_urgent.total() == max_queued:
                assert held[flow] > max_queued / num_flows
                assert held[flow] == max(held.values())
        replica.scheduler.check_integrity()
    replica.run()
    for name in replica.truths:
        if name in replica.chunks and replica.finish_reason(name) is not FinishReason.ERROR:
            replica.check_stream(name)


def test_a_flood_of_one_flow_leaves_a_place_for_the_first_of_any_other():
    replica = Replica(make_config(max_queued=10))
    flood(replica, "flood", 10)
    for number in range(9):
        replica.submit(make_request(f"other-{number}", tenant=f"tenant-{number}"))
        with pytest.raises(Overloaded):
            replica.submit(make_request(f"more-{number}", tenant="flood"))
    assert Counter(tenant for tenant, _ in waiting(replica).values())["flood"] == 1
    with pytest.raises(Overloaded):
        replica.submit(make_request("one-too-many", tenant="another"))
