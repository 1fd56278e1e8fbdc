"""Early abort: requests that cannot have their first token in time are refused as soon as that is clear."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.engine.scheduler.plan import StepPlan
from rekindle.engine.scheduler.scheduler import Scheduler
from rekindle.engine.scheduler.step_times import StepTimes
from rekindle.errors import InvalidRequest
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.identity import RequestId
from support.scheduling import Replica, Truth, make_config, make_request


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


@pytest.mark.parametrize("slo_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_deadline_that_is_none_is_refused(slo_s):
    with pytest.raises(InvalidRequest, match="ttft_slo_s must be a positive number"):
        make_request("a", ttft_slo_s=slo_s)


def test_an_idle_scheduler_has_nobody_to_refuse():
    scheduler = Scheduler(make_config())
    assert scheduler.refuse_late(1.0) == ()
    scheduler.note_duration(StepPlan(1), 0.01)
