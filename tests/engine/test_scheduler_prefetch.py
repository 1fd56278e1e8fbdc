"""Adapters loaded ahead for those who wait: in the order of turns, few at a time, at nobody's cost."""

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rekindle.engine.scheduler.plan import PlannedSequence
from rekindle.engine.scheduler.prefetch import MAX_LOADS
from rekindle.protocol.identity import AdapterDigest, RequestId
from support.scheduling import PAGE_TOKENS, STEP_S, Replica, make_config, make_manifest, make_request


def planned_names(plan):
    return [planned.request.request_id for planned in plan.sequences]


def replica_with(sizes, **limits):
    """A replica that knows adapters of so many pages, and how long its steps take."""
    replica = Replica(make_config(**limits))
    for name, num_pages in sizes.items():
        replica.scheduler.add_adapter(make_manifest(name, num_pages))
    return replica


def step(replica):
    """One step of the length that the replica knows of, and a load that takes no longer."""
    plan = replica.step()
    if plan.sequences:
        replica.scheduler.note_duration(plan, STEP_S)
    return plan


def loads_of(plan):
    return [load.manifest.digest for load in plan.loads]


def busy(sizes, num_busy=1, **limits):
    """A replica whose batch is full for long."""
    replica = replica_with(sizes, **{"max_sequences": num_busy, "num_pages": 100, **limits})
    for number in range(num_busy):
        replica.submit(make_request(f"busy-{number}", 3, max_tokens=40))
    step(replica)
    return replica


def test_while_the_batch_is_full_the_adapter_of_the_next_in_turn_is_loaded_so_that_it_need_not_wait_later():
    replica = busy({"x": 3})
    replica.submit(make_request("next", adapter="x"))
    assert loads_of(step(replica)) == ["x"]
    replica.end_all_loads()
    while "next" not in planned_names(replica.plans[-1]):
        step(replica)
    busy_steps = [number for number, plan in enumerate(replica.plans) if "busy-0" in planned_names(plan)]
    assert len(replica.plans) - 1 == busy_steps[-1] + 1
    replica.run()
    replica.check_stream(RequestId("next"))


def test_loads_ahead_follow_the_order_of_turns_and_are_few_at_a_time_and_one_for_each_adapter():
    names = ["a", "b", "c", "d"]
    replica = busy(dict.fromkeys(names, 2))
    for number, name in enumerate(names):
        for copy in range(2):
            replica.submit(make_request(f"{name}-{copy}", adapter=name, priority=-number))
    assert loads_of(step(replica)) == ["d", "c"]
    assert len(names) > MAX_LOADS == 2
    assert loads_of(step(replica)) == []
    replica.end_load(AdapterDigest("d"))
    assert loads_of(step(replica)) == ["b"]
    replica.run()
    assert Counter(name for plan in replica.plans for name in loads_of(plan)) == dict.fromkeys(names, 1)


def test_an_adapter_loaded_ahead_stays_until_its_sequence_has_used_it_or_is_gone():
    replica = busy({"first": 40, "second": 50, "third": 40}, num_pages=110)
    for name in ("first", "second", "third"):
        replica.submit(make_request(name, adapter=name))
        step(replica)
        replica.end_all_loads()
    step(replica)
    assert replica.scheduler.stats().resident_adapters == ("first", "second")
    replica.abort(RequestId("first"))
    plan = step(replica)
    assert (plan.evicted, loads_of(plan)) == (("first",), ["third"])
    replica.end_all_loads()
    replica.run()
    replica.check_stream(RequestId("second"))
    replica.check_stream(RequestId("third"))
    assert replica.scheduler.stats().adapter_loads_total == 3


def test_an_idle_adapter_worth_more_is_not_evicted_for_a_load_ahead_but_one_worth_less_is():
    for num_uses, evicted in ((1, ("idle",)), (200, ())):
        replica = replica_with({"idle": 4, "large": 66}, num_pages=70, max_sequences=1)
        for number in range(num_uses):
            replica.submit(make_request(f"use-{number}", (1,), max_tokens=1, adapter="idle"))
            replica.run()
        replica.submit(make_request("busy", 2, max_tokens=24))
        step(replica)
        replica.submit(make_request("ahead", adapter="large"))
        assert step(replica).evicted == evicted
        replica.run()
        replica.check_stream(RequestId("ahead"))


def test_running_sequences_take_the_pages_of_an_adapter_loaded_ahead_before_anyone_is_preempted():
    replica = busy({"x": 80}, num_busy=2, num_pages=100, max_step_tokens=100)
    replica.submit(make_request("next", adapter="x"))
    step(replica)
    replica.end_all_loads()
    assert replica.scheduler.stats().resident_adapters == ("x",)
    for number in range(2):
        replica.abort(RequestId(f"busy-{number}"))
    replica.submit(make_request("urgent-0", 30, max_tokens=140, priority=-1))
    replica.submit(make_request("urgent-1", 30, max_tokens=140, priority=-1))
    while replica.scheduler.has_work:
        step(replica)
        replica.end_all_loads()
    assert any("x" in plan.evicted for plan in replica.plans)
    assert not any(plan.preempted for plan in replica.plans)
    for name in ("urgent-0", "urgent-1", "next"):
        replica.check_stream(RequestId(name))


@pytest.mark.parametrize(("num_adapter_pages", "loads"), [(80, ["x"]), (97, [])])
def test_the_pages_that_running_sequences_will_ask_for_while_a_load_lasts_are_left(num_adapter_pages, loads):
    replica = busy({"x": num_adapter_pages}, num_busy=2, num_pages=100)
    for _ in range(100):
        replica.scheduler.note_duration(replica.plans[0], 0.001)
    replica.submit(make_request("next", 2, max_tokens=2, adapter="x"))
    assert loads_of(step(replica)) == loads


def test_a_sequence_that_lacks_pages_has_its_adapter_loaded_ahead_and_nobody_behind_it_has():
    replica = replica_with({"x": 5, "y": 5}, num_pages=30, max_sequences=4)
    replica.submit(make_request("running", 60, max_tokens=8, priority=-1))
    while not replica.output("running"):
        step(replica)
    replica.submit(make_request("lacking", 40, max_tokens=2, adapter="x"))
    replica.submit(make_request("behind", 40, max_tokens=2, adapter="y"))
    assert loads_of(step(replica)) == ["x"]
    replica.end_all_loads()
    assert loads_of(step(replica)) == []
    replica.run()
    for name in ("lacking", "behind"):
        replica.check_stream(RequestId(name))


def takes_pages(planned: PlannedSequence) -> bool:
    """Whether a sequence begins or grows in this step, for which what others wait for may be evicted."""
    end = planned.start + planned.num_positions
    return -(-planned.start // PAGE_TOKENS) < -(-end // PAGE_TOKENS)


@settings(max_examples=60, deadline=None)
@example(
    sizes=[10, 3, 3, 2, 1],
    requests=[
        (1, 14, 11), (4, 1, 1), (0, 9, 20), (0, 1, 1), (0, 1, 1),
        (1, 2, 3), (2, 17, 8), (7, 3, 11), (1, 1, 1), (3, 1, 1),
    ],
    max_sequences=2,
    load_steps=3,
)  # fmt: skip
@given(
    sizes=st.lists(st.integers(1, 12), min_size=3, max_size=8),
    requests=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 20), st.integers(1, 20)), min_size=5, max_size=30),
    max_sequences=st.integers(1, 3),
    load_steps=st.integers(1, 4),
)
def test_loads_ahead_are_few_never_evict_what_others_wait_for_and_lose_no_stream(
    sizes, requests, max_sequences, load_steps
):
    replica = replica_with(
        {f"a{number}": size for number, size in enumerate(sizes)}, num_pages=24, max_sequences=max_sequences
    )
    for number, (adapter, num_prompt, max_tokens) in enumerate(requests):
        name = f"a{adapter % len(sizes)}"
        replica.submit(make_request(f"r{number}", num_prompt, max_tokens, adapter=name))
    for number in range(5000):
        if not replica.scheduler.has_work:
            break
        num_before = len(replica.device.loads)
        plan = step(replica)
        num_ahead = sum("ahead of its turn" in reason for reason in plan.reasons)
        assert not num_ahead or num_before + num_ahead <= MAX_LOADS
        if num_ahead == len(plan.loads) and not any(takes_pages(planned) for planned in plan.sequences):
            awaited = {replica.truths[name].request.adapter for name in unstarted(replica)}
            assert plan.preempted or not num_ahead or not awaited & set(plan.evicted)
        if number % load_steps == 0:
            replica.end_all_loads()
    for number in range(len(requests)):
        replica.check_stream(RequestId(f"r{number}"))


def unstarted(replica):
    started = {name for plan in replica.plans for name in planned_names(plan)}
    return replica.truths.keys() - started
