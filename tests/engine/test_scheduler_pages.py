import pytest

from rekindle.engine.scheduler.admission import MAX_OVERTAKEN
from rekindle.engine.scheduler.plan import SequenceResult, StepResult
from rekindle.engine.scheduler.scheduler import Scheduler
from rekindle.errors import (
    InternalError,
)
from rekindle.protocol.generation import FinishReason, TokenLogprobs
from rekindle.protocol.identity import RequestId
from support.scheduling import Replica, make_config, make_request


def planned_names(plan):
    return [planned.request.request_id for planned in plan.sequences]


def test_a_sequence_is_planned_ahead_with_a_placeholder_for_its_unsampled_token():
    replica = Replica(make_config(), depth=2)
    replica.submit(make_request("a", 5, max_tokens=10))
    first, second = replica.schedule().sequences[0], replica.schedule().sequences[0]
    assert (first.start, len(first.token_ids), first.num_placeholders, first.samples) == (0, 5, 0, True)
    assert (second.start, second.token_ids, second.num_placeholders, second.samples) == (5, (), 1, True)
    assert len(second.history) == 0
    replica.drain()
    assert len(replica.output("a")) == 2
    assert (len(first.history), len(second.history)) == (0, 0)
    assert list(replica.schedule().sequences[0].history) == list(replica.output("a"))


def test_no_more_is_planned_ahead_than_max_tokens_can_use():
    replica = Replica(make_config(), depth=3)
    replica.submit(make_request("a", 5, max_tokens=2))
    assert [len(replica.schedule().sequences) for _ in range(3)] == [1, 1, 0]
    assert not replica.scheduler.has_runnable
    replica.drain()
    assert replica.finish_reason("a") is FinishReason.LENGTH


def test_a_stop_token_found_at_commit_discards_what_was_planned_after_it():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 3, max_tokens=10, stop=(9,)), 0.0)
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    (chunk,) = scheduler.commit(first, StepResult(first.step, (SequenceResult((9,), 3),)))
    assert chunk.finish_reason is FinishReason.STOP
    assert scheduler.stats().pages_kv_in_use == 1
    assert scheduler.commit(second, StepResult(second.step, (SequenceResult((4,), 1),))) == ()
    assert scheduler.stats().pages_kv_in_use == 0
    scheduler.check_integrity()


def test_positions_that_were_not_accepted_are_planned_again():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 6, max_tokens=4), 0.0)
    plan = scheduler.schedule(0.0)
    assert scheduler.commit(plan, StepResult(plan.step, (SequenceResult((), 4),))) == ()
    (again,) = scheduler.schedule(0.0).sequences
    assert (again.start, again.num_positions, again.samples) == (4, 2, True)


def test_a_last_position_that_gave_no_token_is_planned_again():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 4, max_tokens=4), 0.0)
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert scheduler.commit(first, StepResult(first.step, (SequenceResult((), 4),))) == ()
    (again,) = scheduler.schedule(0.0).sequences
    assert (again.start, again.num_positions, again.samples) == (3, 1, True)
    assert scheduler.commit(second, StepResult(second.step, (SequenceResult((1,), 1),))) == ()


def test_several_tokens_of_one_step_are_cut_at_the_end_of_the_stream():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 2, max_tokens=3, logprobs=0), 0.0)
    plan = scheduler.schedule(0.0)
    logprobs = tuple(TokenLogprobs(token, -1.0) for token in (1, 2, 3, 4))
    (chunk,) = scheduler.commit(plan, StepResult(plan.step, (SequenceResult((1, 2, 3, 4), 2, logprobs),)))
    assert (chunk.token_ids, chunk.logprobs, chunk.finish_reason) == ((1, 2, 3), logprobs[:3], FinishReason.LENGTH)


def test_plans_must_be_committed_in_their_order_and_with_results_of_their_size():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 2, logprobs=0, prompt_logprobs=0), 0.0)
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    with pytest.raises(InternalError, match=f"step {second.step} is not the oldest plan in flight"):
        scheduler.commit(second, StepResult(second.step, (SequenceResult(),)))
    with pytest.raises(InternalError, match="has 1 sequences, but its result"):
        scheduler.commit(first, StepResult(first.step, ()))
    with pytest.raises(InternalError, match="request a: 3 positions accepted of 2 planned"):
        scheduler.commit(first, StepResult(first.step, (SequenceResult((), 3),)))
    with pytest.raises(InternalError, match="request a: 0 log-probabilities came with 1 tokens"):
        scheduler.commit(first, StepResult(first.step, (SequenceResult((1,), 2),)))
    entry = (TokenLogprobs(1, -1.0),)
    with pytest.raises(InternalError, match="request a: 0 prompt log-probabilities came for 1 positions from 0 on"):
        scheduler.commit(first, StepResult(first.step, (SequenceResult((1,), 2, entry),)))
    assert scheduler.commit(first, StepResult(first.step, (SequenceResult((1,), 2, entry, entry),)))
    assert scheduler.commit(second, StepResult(second.step, (SequenceResult((1,), 1, entry),)))


def test_the_latest_arrival_is_preempted_when_pages_run_out_and_keeps_its_tokens():
    replica = Replica(make_config(num_pages=8, max_sequences=2))
    replica.submit(make_request("old", 4, max_tokens=25))
    replica.submit(make_request("new", 4, max_tokens=25))
    replica.run()
    preempted = [plan for plan in replica.plans if plan.preempted]
    assert {name for plan in preempted for name in plan.preempted} == {"new"}
    assert any("new gives back 4 pages" in reason and "old needs pages" in reason for reason in preempted[0].reasons)
    assert replica.scheduler.stats().preemptions_total == len(preempted)
    replica.check_stream(RequestId("old"))
    replica.check_stream(RequestId("new"))


def test_a_victim_in_flight_keeps_its_pages_until_the_commit_and_loses_no_token():
    replica = Replica(make_config(num_pages=5, max_sequences=2), depth=2)
    replica.submit(make_request("old", 4, max_tokens=12))
    replica.submit(make_request("new", 4, max_tokens=12))
    while not replica.plans or not replica.plans[-1].preempted:
        replica.step()
    assert planned_names(replica.plans[-2]) == ["old", "new"]
    replica.run()
    replica.check_stream(RequestId("old"))
    replica.check_stream(RequestId("new"))


def test_nobody_is_preempted_while_pages_of_an_ended_sequence_are_about_to_come_free():
    replica = Replica(make_config(num_pages=6, max_sequences=3), depth=2)
    for name in ("old", "new", "aborted"):
        replica.submit(make_request(name, 3, max_tokens=8))
    while replica.schedule().sequences[0].start < 7:
        if len(replica.plans) > 1:
            replica.execute_and_commit()
    replica.abort(RequestId("aborted"))
    plan = replica.schedule()
    assert (plan.sequences, plan.preempted) == ((), ())
    assert plan.reasons == ("old stands still: it waits for 1 pages", "new stands still: it waits for 1 pages")
    replica.drain()
    assert planned_names(replica.schedule()) == ["old", "new"]
    replica.run()
    assert not any(plan.preempted for plan in replica.plans)


def test_nobody_is_admitted_in_a_step_that_preempts():
    replica = Replica(make_config(num_pages=6, max_sequences=3))
    replica.submit(make_request("old", 4, max_tokens=16))
    replica.submit(make_request("new", 4, max_tokens=16))
    while not replica.plans or not replica.plans[-1].preempted:
        replica.step()
        if len(replica.plans) == 6:
            replica.submit(make_request("late", 4, max_tokens=1))
    assert planned_names(replica.plans[-1]) == ["old"]
    replica.run()
    replica.check_stream(RequestId("late"))


def test_a_sequence_that_lacks_pages_does_not_hold_up_those_behind_it():
    replica = Replica(make_config(num_pages=10))
    replica.submit(make_request("running", 8, max_tokens=20))
    replica.step()
    replica.submit(make_request("big", 30, max_tokens=2))
    replica.submit(make_request("small", 3, max_tokens=2))
    plan = replica.step()
    assert planned_names(plan) == ["running", "small"]
    assert plan.reasons == ("big waits for pages: it takes 8, 1 are kept for running sequences, 7 can be had",)
    replica.run()
    replica.check_stream(RequestId("big"))


def test_a_sequence_that_lacks_pages_is_overtaken_a_bounded_number_of_times():
    replica = Replica(make_config(num_pages=12, max_sequences=4))
    replica.submit(make_request("first", 8, max_tokens=3))
    replica.step()
    replica.submit(make_request("big", 40, max_tokens=2))
    number = 0
    while "big" not in planned_names(replica.plans[-1]):
        number += 1
        replica.submit(make_request(f"small-{number}", 8, max_tokens=3))
        replica.step()
        assert number < 1000
    overtaking = {name for plan in replica.plans for name in planned_names(plan)} - {"first", "big"}
    assert len(overtaking) == MAX_OVERTAKEN
    assert any("nobody behind big is admitted" in reason for plan in replica.plans for reason in plan.reasons)
    replica.run()
    replica.check_stream(RequestId("big"))


def test_idle_prefix_pages_are_evicted_before_anyone_is_preempted():
    replica = Replica(make_config(num_pages=10))
    for name in ("a", "b", "c", "d"):
        replica.submit(make_request(name, 16, max_tokens=12))
        replica.run()
        replica.check_stream(RequestId(name))
    stats = replica.scheduler.stats()
    assert stats.preemptions_total == 0
    assert stats.pages_prefix_cache + stats.pages_free == 10
