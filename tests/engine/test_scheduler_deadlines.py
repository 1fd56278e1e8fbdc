"""Early abort: requests that cannot have their first token in time are refused as soon as that is clear."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.engine.scheduler.plan import StepPlan
from rekindle.engine.scheduler.scheduler import Scheduler
from rekindle.engine.scheduler.step_times import StepTimes
from rekindle.errors import InvalidRequest
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.identity import AdapterDigest, RequestId
from support.scheduling import Replica, Truth, make_config, make_manifest, make_request


@settings(max_examples=50, deadline=None)
@given(
    constant=st.floats(0.001, 0.1),
    per_prompt_token=st.floats(1e-5, 5e-3),
    per_decode=st.floats(1e-5, 5e-3),
    seed=st.integers(0, 1000),
)
def test_step_times_are_learnt_from_steps_of_all_kinds(constant, per_prompt_token, per_decode, seed):
    chance = random.Random(seed)
    times = StepTimes()

    def true_s(num_prompt, num_decodes):
        return constant + per_prompt_token * num_prompt + per_decode * num_decodes

    for _ in range(300):
        num_prompt, num_decodes = chance.choice([0, 0, chance.randrange(512)]), chance.randrange(64)
        times.note(num_prompt, num_decodes, true_s(num_prompt, num_decodes) * chance.uniform(0.95, 1.05))
    for num_prompt, num_decodes in ((0, 1), (0, 32), (256, 0), (512, 16)):
        expected = pytest.approx(true_s(num_prompt, num_decodes), rel=0.2, abs=0.01 * true_s(512, 64))
        assert times.step_s(num_prompt, num_decodes) == expected


def test_steps_that_are_all_alike_leave_the_model_defined():
    times = StepTimes()
    for _ in range(1000):
        times.note(0, 4, 0.02)
    assert times.step_s(0, 4) == pytest.approx(0.02, rel=0.05)
    assert 0 < times.step_s(512, 4) < 10


def test_a_model_forgets_how_fast_the_machine_once_was():
    times = StepTimes()
    for _ in range(500):
        times.note(0, 1, 0.001)
    for _ in range(1000):
        times.note(0, 1, 0.1)
    assert times.step_s(0, 1) == pytest.approx(0.1, rel=0.05)


class TimedReplica(Replica):
    """A replica whose steps take a time that follows from what they do; keeps the time of each first token."""

    def __init__(self, config):
        super().__init__(config)
        self.first_token_s = {}

    def timed_step(self):
        self.collect(self.scheduler.refuse_late(self.now_s))
        plan = self.step()
        num_prompt = sum(planned.num_positions for planned in plan.sequences if planned.num_positions > 1)
        duration_s = 0.01 + 0.001 * num_prompt + 0.0005 * (plan.num_tokens - num_prompt)
        self.scheduler.note_duration(plan, duration_s)
        self.now_s += duration_s

    def collect(self, chunks):
        super().collect(chunks)
        for chunk in chunks:
            if chunk.token_ids:
                self.first_token_s.setdefault(chunk.request_id, self.now_s)


def test_a_request_that_fits_its_time_is_served_and_one_that_does_not_is_refused_with_advice():
    replica = TimedReplica(make_config(num_pages=2000, max_step_tokens=32, max_sequences=4))
    replica.submit(make_request("warm", 300, 20))
    while replica.scheduler.has_work:
        replica.timed_step()
    for i in range(3):
        replica.submit(make_request(f"busy-{i}", 300, 5))
    replica.submit(make_request("patient", 20, 5, ttft_slo_s=1000.0))
    replica.submit(make_request("hasty", 20, 5, ttft_slo_s=0.05))
    replica.timed_step()
    (chunk,) = replica.chunks[RequestId("hasty")]
    assert chunk.finish_reason is FinishReason.ERROR
    assert "of the 0.05 s that ttft_slo_ms allows" in chunk.error
    assert chunk.refusal.kind == "DeadlineUnreachable"
    assert chunk.refusal.retry_after_s > 0
    while replica.scheduler.has_work:
        replica.timed_step()
    replica.check_stream(RequestId("patient"))


def test_requests_without_a_deadline_and_resumed_ones_are_never_refused():
    replica = TimedReplica(make_config(num_pages=2000, max_step_tokens=32, max_sequences=2))
    fields = {"prompt": 20, "max_tokens": 5, "ttft_slo_s": 0.001}
    generated = Truth(make_request("resumed", **fields), 1000).output[:2]
    replica.submit(make_request("long", 500, 5))
    replica.submit(make_request("plain", 20, 5))
    replica.submit(make_request("late", **fields))
    replica.submit(make_request("resumed", **fields, generated=generated, epoch=1))
    replica.submit(make_request("begun-anew", **fields, epoch=1))
    while replica.scheduler.has_work:
        replica.timed_step()
    assert replica.finish_reason("late") is FinishReason.ERROR
    for name in ("long", "plain", "resumed", "begun-anew"):
        replica.check_stream(RequestId(name))


@pytest.mark.parametrize(("waited_s", "is_refused"), [(4.0, False), (6.0, True)])
def test_time_that_passed_before_a_request_came_counts(waited_s, is_refused):
    replica = TimedReplica(make_config(num_pages=2000))
    replica.submit(replace(make_request("r", ttft_slo_s=5.0), waited_s=waited_s))
    while replica.scheduler.has_work:
        replica.timed_step()
    assert (replica.finish_reason("r") is FinishReason.ERROR) == is_refused


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0.0, 0.1), min_size=10, max_size=60),
    sizes=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 20)), min_size=60, max_size=60),
    slo_s=st.floats(0.1, 2.0),
    max_sequences=st.integers(1, 8),
)
def test_whoever_is_not_refused_has_the_first_token_in_time_or_nearly_so(gaps, sizes, slo_s, max_sequences):
    """The estimate may err: by the steps that an uneven batch adds, never by more than half the time allowed."""
    replica = TimedReplica(make_config(num_pages=4000, max_step_tokens=32, max_sequences=max_sequences))
    arrivals = {}
    due_s = 0.0
    pending = []
    for i, gap_s in enumerate(gaps):
        due_s += gap_s
        pending.append((due_s, make_request(f"r{i}", *sizes[i], ttft_slo_s=slo_s)))
    while pending or replica.scheduler.has_work:
        while pending and pending[0][0] <= replica.now_s:
            _, request = pending.pop(0)
            arrivals[request.request_id] = replica.now_s
            replica.submit(request)
        replica.timed_step()
    for name, arrived_s in arrivals.items():
        if replica.finish_reason(name) is not FinishReason.ERROR:
            assert replica.first_token_s[name] - arrived_s <= slo_s * 1.5 + 0.1
            replica.check_stream(name)


@pytest.mark.parametrize("max_step_tokens", [8, 64, 2048])
@pytest.mark.parametrize("warm_up_s", [None, 0.02, 3.0])
def test_an_idle_replica_tries_whatever_it_knows_of_its_speed(max_step_tokens, warm_up_s):
    replica = TimedReplica(make_config(num_pages=2000, max_step_tokens=max_step_tokens, max_context_tokens=5000))
    if warm_up_s is not None:
        replica.submit(make_request("first", 5, 8))
        plan = replica.step()
        replica.scheduler.note_duration(plan, warm_up_s)
        while replica.scheduler.has_work:
            replica.timed_step()
    replica.submit(make_request("long", 4000, 2, ttft_slo_s=1.0))
    replica.timed_step()
    assert RequestId("long") not in replica.chunks or replica.finish_reason("long") is None


def test_a_prompt_that_is_cached_counts_for_what_is_left_of_it():
    replica = TimedReplica(make_config(num_pages=2000, max_step_tokens=64, max_context_tokens=5000))
    replica.submit(make_request("before", 2000, 1))
    while replica.scheduler.has_work:
        replica.timed_step()
    prompt = replica.truths[RequestId("before")].request.prompt_token_ids
    replica.submit(make_request("other", 2, 200))
    replica.timed_step()
    replica.submit(make_request("cached", prompt, 1, ttft_slo_s=1.0))
    replica.submit(make_request("fresh", 2000, 1, ttft_slo_s=1.0))
    replica.timed_step()
    assert replica.finish_reason("fresh") is FinishReason.ERROR
    while replica.scheduler.has_work:
        replica.timed_step()
    replica.check_stream(RequestId("cached"))


def test_time_in_which_nobody_waits_is_no_interval_between_departures():
    replica = TimedReplica(make_config(max_sequences=1))
    for name in ("x", "y"):
        replica.submit(make_request(name, 5, 50))
    replica.timed_step()
    for name in ("x", "y"):
        replica.abort(RequestId(name))
    replica.now_s += 3600.0
    for name in ("a", "b"):
        replica.submit(make_request(name, 5, 2))
    replica.timed_step()
    replica.submit(make_request("c", 5, 2, ttft_slo_s=30.0))
    while replica.scheduler.has_work:
        replica.timed_step()
    replica.check_stream(RequestId("c"))


def replica_that_knows_loads(load_s, **limits):
    """A replica that has learnt that a load takes so long, and knows adapters `x`, `y` and `z`, absent."""
    replica = TimedReplica(make_config(num_pages=200, **limits))
    for name in ("warm", "x", "y", "z"):
        replica.scheduler.add_adapter(make_manifest(name, 2))
    for number in range(40):
        replica.submit(make_request(f"warm-{number}", 3, 1, adapter="warm"))
        replica.timed_step()
        replica.now_s += load_s
        replica.end_all_loads()
        while replica.scheduler.has_work:
            replica.timed_step()
        replica.scheduler.remove_adapter(AdapterDigest("warm"))
        replica.timed_step()
        replica.scheduler.add_adapter(make_manifest("warm", 2))
    assert replica.scheduler.stats().adapter_loads_total == 40
    return replica


@pytest.mark.parametrize(("slo_s", "is_refused"), [(2.0, True), (9.0, False)])
def test_a_request_that_its_adapters_load_alone_would_make_late_is_refused_at_once(slo_s, is_refused):
    replica = replica_that_knows_loads(4.0)
    replica.submit(make_request("first", 3, 30))
    replica.timed_step()
    replica.submit(make_request("a", 3, 2, adapter="x", ttft_slo_s=slo_s))
    replica.collect(replica.scheduler.refuse_late(replica.now_s))
    assert (RequestId("a") in replica.chunks) is is_refused


def test_loads_that_come_before_its_own_make_a_request_late():
    replica = replica_that_knows_loads(4.0)
    replica.submit(make_request("first", 3, 30, adapter="x"))
    replica.submit(make_request("second", 3, 30, adapter="y"))
    replica.timed_step()
    replica.submit(make_request("late", 3, 2, adapter="z", ttft_slo_s=9.0))
    replica.submit(make_request("same", 3, 2, adapter="y", ttft_slo_s=9.0))
    replica.submit(make_request("base", 3, 2, ttft_slo_s=1.0))
    replica.collect(replica.scheduler.refuse_late(replica.now_s))
    assert replica.finish_reason("late") is FinishReason.ERROR
    assert RequestId("same") not in replica.chunks
    assert RequestId("base") not in replica.chunks, "those that wait for loads do not stand before it"


def test_prompts_that_wait_for_loads_which_end_soon_stand_before_those_behind():
    replica = replica_that_knows_loads(0.001, max_step_tokens=16)
    replica.submit(make_request("running", 3, 300))
    replica.timed_step()
    replica.submit(make_request("long", 600, 1, adapter="x", priority=-1))
    replica.submit(make_request("behind", 40, 1, ttft_slo_s=0.3))
    replica.collect(replica.scheduler.refuse_late(replica.now_s))
    assert replica.finish_reason("behind") is FinishReason.ERROR


def test_what_waits_for_a_load_is_refused_when_its_time_is_over_though_nothing_can_run():
    replica = TimedReplica(make_config())
    replica.scheduler.add_adapter(make_manifest("x"))
    assert replica.scheduler.next_deadline_s is None
    began_s = replica.now_s
    replica.submit(make_request("patient", adapter="x", ttft_slo_s=50.0))
    replica.submit(make_request("hasty", adapter="x", ttft_slo_s=5.0))
    replica.submit(make_request("easy", adapter="x"))
    replica.timed_step()
    assert not replica.scheduler.has_runnable
    assert replica.scheduler.next_deadline_s == began_s + 5.0
    replica.now_s = replica.scheduler.next_deadline_s
    replica.collect(replica.scheduler.refuse_late(replica.now_s))
    assert replica.finish_reason("hasty") is FinishReason.ERROR
    assert replica.scheduler.next_deadline_s == began_s + 50.0
    replica.end_all_loads()
    replica.run()
    for name in ("patient", "easy"):
        replica.check_stream(RequestId(name))
    assert replica.scheduler.next_deadline_s is None


@pytest.mark.parametrize("slo_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deadline_that_is_none_is_refused(slo_s):
    with pytest.raises(InvalidRequest, match="ttft_slo_s must be a positive number"):
        make_request("a", ttft_slo_s=slo_s)


def test_an_idle_scheduler_has_nobody_to_refuse():
    scheduler = Scheduler(make_config())
    assert scheduler.refuse_late(1.0) == ()
    scheduler.note_duration(StepPlan(1), 0.01)
