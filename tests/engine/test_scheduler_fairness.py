"""Whose turn it is: flows, weights, priorities, and clustering by adapter."""

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.engine.scheduler.fairness import OUTPUT_TOKEN_COST, PROMPT_TOKEN_COST, Flow, FlowCounters
from rekindle.engine.scheduler.waiting import CLUSTER_TOKENS, CLUSTER_WAIT_S, MANY_ADAPTERS
from rekindle.errors import InvalidRequest
from support.scheduling import STEP_S, Replica, make_config, make_manifest, make_request


def admissions(replica):
    """Names in the order in which they first ran."""
    return list(dict.fromkeys(planned.request.request_id for plan in replica.plans for planned in plan.sequences))


def replica_with(*adapters, **changes):
    replica = Replica(make_config(**{"num_pages": 400, "max_sequences": 1, **changes}))
    for adapter in adapters:
        replica.scheduler.add_adapter(make_manifest(adapter))
    return replica


def submit(replica, names, **fields):
    for name in names:
        replica.submit(make_request(name, **fields))


def test_a_newcomer_waits_for_one_turn_of_each_other_flow_however_long_their_queues():
    replica = replica_with("x", "y")
    submit(replica, [f"x{i}" for i in range(5)], adapter="x")
    submit(replica, [f"base{i}" for i in range(5)])
    replica.step()
    submit(replica, ["y"], adapter="y")
    replica.run()
    before = admissions(replica).index("y")
    assert before <= 3
    assert admissions(replica)[0] == "base0", "the adapter of the first was not there yet"


def test_tenants_that_share_an_adapter_take_turns():
    replica = replica_with()
    submit(replica, [f"a{i}" for i in range(6)], tenant="a")
    submit(replica, [f"b{i}" for i in range(2)], tenant="b")
    replica.run()
    assert [name[0] for name in admissions(replica)] == list("ababaaaa")


def test_within_a_flow_the_first_comes_first():
    replica = replica_with("x")
    submit(replica, ["a", "b", "c", "d"], adapter="x")
    replica.run()
    assert admissions(replica) == ["a", "b", "c", "d"]


def test_a_lower_priority_number_goes_first_whatever_its_flow_has_had():
    replica = replica_with()
    submit(replica, ["late"], priority=5, tenant="new")
    submit(replica, ["normal-0", "normal-1"], tenant="a")
    submit(replica, ["urgent-0", "urgent-1", "urgent-2"], tenant="b", priority=-1)
    replica.run()
    assert admissions(replica) == ["urgent-0", "urgent-1", "urgent-2", "normal-0", "normal-1", "late"]


def test_a_flow_of_more_weight_has_more_turns():
    replica = replica_with()
    submit(replica, [f"heavy-{i}" for i in range(30)], tenant="heavy", weight=3.0)
    submit(replica, [f"light-{i}" for i in range(30)], tenant="light")
    replica.run()
    first = Counter(name.split("-")[0] for name in admissions(replica)[:20])
    assert abs(first["heavy"] - 15) <= 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(InvalidRequest, match="weight must be a positive number"):
        make_request("a", weight=weight)


FLOW_REQUESTS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=25, max_size=25)


@settings(max_examples=60, deadline=None)
@given(requests_a=FLOW_REQUESTS, requests_b=FLOW_REQUESTS, max_sequences=st.integers(1, 4), depth=st.integers(1, 2))
def test_flows_that_always_wait_are_served_alike(requests_a, requests_b, max_sequences, depth):
    """The paper's theorem 4.4: at any time the difference is at most twice what a full batch and one prompt count."""
    replica = Replica(make_config(num_pages=400, max_sequences=max_sequences), depth)
    for i, pair in enumerate(zip(requests_a, requests_b, strict=True)):
        for tenant, (num_prompt, max_tokens) in zip("ab", pair, strict=True):
            replica.submit(make_request(f"{tenant}{i}", num_prompt, max_tokens, tenant=tenant))
    bound = 2 * (12 + OUTPUT_TOKEN_COST * 12 * max_sequences)
    waiting = Counter(a=25, b=25)
    served = Counter(a=0.0, b=0.0)
    seen = set()
    while replica.scheduler.has_work and min(waiting.values()) > 0:
        plan = replica.step()
        for planned in plan.sequences:
            tenant = planned.request.tenant
            if planned.request.request_id not in seen:
                seen.add(planned.request.request_id)
                waiting[tenant] -= 1
                served[tenant] += len(planned.request.prompt_token_ids)
            served[tenant] += OUTPUT_TOKEN_COST * planned.samples
        assert abs(served["a"] - served["b"]) <= bound
    replica.run()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10)), min_size=12, max_size=40),
    num_flows=st.integers(1, 5),
    max_sequences=st.integers(1, 4),
    num_steps_before=st.integers(0, 60),
)
def test_a_single_request_is_overtaken_by_at_most_one_of_each_flow_that_has_had_no_less(
    sizes, num_flows, max_sequences, num_steps_before
):
    replica = replica_with("lonely", max_sequences=max_sequences)
    submit(replica, ["warm-up"], adapter="lonely", max_tokens=1)
    replica.run()
    for i, (num_prompt, max_tokens) in enumerate(sizes):
        replica.submit(make_request(f"r{i}", num_prompt, max_tokens, tenant=f"tenant-{i % num_flows}"))
    for _ in range(num_steps_before):
        replica.step()
    before = set(admissions(replica))
    submit(replica, ["single"], adapter="lonely", tenant="someone")
    replica.run()
    later = [name for name in admissions(replica) if name not in before]
    overtaking = Counter(replica.truths[name].request.tenant for name in later[: later.index("single")])
    assert all(count <= 1 for count in overtaking.values())


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 10)), min_size=1, max_size=12),
    num_flows=st.integers(1, 6),
    max_sequences=st.integers(1, 4),
    num_prompt_tokens_a_step=st.integers(1, 16),
    num_steps_before=st.integers(1, 40),
)
def test_saturation_by_others_delays_a_single_request_by_no_more_steps_than_the_stated_bound(
    sizes, num_flows, max_sequences, num_prompt_tokens_a_step, num_steps_before
):
    """The formula of `fairness`. Every other flow's queue is kept full for as long as the request waits."""
    replica = replica_with(
        "busy", "quiet", max_sequences=max_sequences, max_step_tokens=max_sequences + num_prompt_tokens_a_step
    )
    submit(replica, ["load-busy"], adapter="busy", max_tokens=1)
    submit(replica, ["load-quiet"], adapter="quiet", max_tokens=1)
    replica.run()
    count = 0

    def saturate():
        nonlocal count
        while len(replica.scheduler._queue) < 20 * num_flows:
            num_prompt, max_tokens = sizes[count % len(sizes)]
            flow = {"adapter": "busy", "tenant": f"tenant-{count % num_flows}"}
            replica.submit(make_request(f"busy-{count}", num_prompt, max_tokens, **flow))
            count += 1

    for _ in range(num_steps_before):
        saturate()
        replica.step()
    submit(replica, ["single"], adapter="quiet")
    longest_prompt, longest_output = (max(column) for column in zip(*sizes, strict=True))
    num_steps = (num_flows // max_sequences + 1) * longest_output + 1
    num_steps += math.ceil((max_sequences + num_flows) * longest_prompt / num_prompt_tokens_a_step)
    for _ in range(num_steps):
        saturate()
        if "single" in [planned.request.request_id for planned in replica.step().sequences]:
            break
    assert "single" in admissions(replica)


def test_turns_cannot_be_saved_up():
    replica = replica_with()
    submit(replica, [f"busy-{i}" for i in range(40)], tenant="busy")
    for _ in range(150):
        replica.step()
    submit(replica, [f"idle-{i}" for i in range(20)], tenant="idle")
    replica.run()
    order = [name.split("-")[0] for name in admissions(replica)]
    since = order[order.index("idle") :][:30]
    assert all(left != right for left, right in pairwise(since))


def test_new_flows_without_end_do_not_keep_one_waiting_that_was_served_before():
    replica = replica_with()
    submit(replica, ["steady-0"], tenant="steady", prompt=20, max_tokens=20)
    submit(replica, ["steady-1"], tenant="steady")
    for i in range(400):
        submit(replica, [f"new-{i}"], tenant=f"tenant-{i}", prompt=2, max_tokens=3)
        for _ in range(3):
            replica.step()
        if "steady-1" in admissions(replica):
            break
    assert "steady-1" in admissions(replica)


def test_when_pages_run_out_the_least_urgent_gives_way():
    replica = replica_with(num_pages=12, max_sequences=4)
    submit(replica, ["low"], prompt=12, max_tokens=30, priority=5)
    replica.step()
    submit(replica, ["high"], prompt=12, max_tokens=30, priority=-5)
    replica.run()
    preempted = [name for plan in replica.plans for name in plan.preempted]
    assert preempted
    assert set(preempted) == {"low"}


def test_counters_of_flows_that_come_and_go_take_no_memory():
    counters = FlowCounters()
    steady = Flow("steady", None)
    counters.begin(steady)
    for i in range(5000):
        flow = Flow(f"tenant-{i}", None)
        counters.begin(flow)
        counters.charge(flow, 10.0, 1.0)
        counters.charge(steady, 2.0, 1.0)
        counters.end(flow)
    assert len(counters) < 500
    counters.end(steady)
    assert len(counters) == 0


def clustered(num_distinct):
    """A replica whose batch holds that many adapters and has room for one more sequence, and in whose queue a stranger
    with an adapter of its own waits."""
    names = [*(f"a{i}" for i in range(num_distinct)), "stranger"]
    replica = replica_with(*names, max_sequences=num_distinct + 1, num_pages=2000)
    submit(replica, ["warm-up"], adapter="stranger", max_tokens=1)
    replica.run()
    submit(replica, [f"in-{i}" for i in range(num_distinct)], prompt=2, max_tokens=1)
    replica.run()
    for i in range(num_distinct):
        submit(replica, [f"long-{i}"], adapter=f"a{i}", max_tokens=400, prompt=2)
    while len({name for name in admissions(replica) if name.startswith("long")}) < num_distinct:
        replica.step()
        replica.end_all_loads()
    submit(replica, ["stranger"], adapter="stranger", max_tokens=2)
    return replica


@pytest.mark.parametrize(("num_distinct", "first"), [(MANY_ADAPTERS, "friend"), (MANY_ADAPTERS - 1, "stranger")])
def test_once_the_batch_holds_many_adapters_those_in_it_go_first(num_distinct, first):
    replica = clustered(num_distinct)
    submit(replica, ["friend"], adapter="a0", max_tokens=2)
    replica.run(4000)
    order = admissions(replica)
    assert min(order.index("friend"), order.index("stranger")) == order.index(first)


@pytest.mark.parametrize(
    ("num_prompt", "num_steps"),
    [(2, CLUSTER_WAIT_S / STEP_S), (22, CLUSTER_TOKENS / (22 * PROMPT_TOKEN_COST + OUTPUT_TOKEN_COST))],
)
def test_a_stranger_is_held_back_for_no_longer_than_the_bounds_on_time_and_service(num_prompt, num_steps):
    replica = clustered(MANY_ADAPTERS)
    count = 0
    while "stranger" not in admissions(replica):
        submit(replica, [f"friend-{count}"], adapter="a0", max_tokens=1, prompt=num_prompt)
        replica.step()
        count += 1
        assert count <= num_steps + 4
    assert count > num_steps / 2
