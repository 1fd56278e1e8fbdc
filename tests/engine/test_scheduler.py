import pytest

from rekindle.engine.scheduler.plan import SequenceResult, StepResult
from rekindle.engine.scheduler.scheduler import Scheduler
from rekindle.errors import (
    ConfigurationError,
    Conflict,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from rekindle.protocol.generation import FinishReason, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest, RequestId
from support.scheduling import PAGE_TOKENS, Noise, Replica, Truth, make_config, make_manifest, make_request


def planned_names(plan):
    return [planned.request.request_id for planned in plan.sequences]


@pytest.mark.parametrize(
    "setting", ["num_pages", "max_step_tokens", "max_sequences", "max_queued", "max_context_tokens"]
)
def test_a_limit_below_one_is_refused_by_name(setting):
    with pytest.raises(ConfigurationError, match=f"{setting} must be at least 1, got 0"):
        make_config(**{setting: 0})


def test_a_step_too_small_for_a_token_of_each_sequence_is_refused():
    with pytest.raises(ConfigurationError, match="max_step_tokens = 7 is less than max_sequences = 8"):
        make_config(max_step_tokens=7, max_sequences=8)


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidRequest, match="the prompt has no tokens") as caught:
        Scheduler(make_config()).submit(make_request("a", ()), 0.0)
    assert caught.value.field == "prompt"


def test_a_prompt_that_fills_the_context_is_refused_with_the_numbers():
    scheduler = Scheduler(make_config(max_context_tokens=20))
    with pytest.raises(InvalidRequest, match="has 20 tokens, but at most 19 fit into the context of 20") as caught:
        scheduler.submit(make_request("a", 20), 0.0)
    assert (caught.value.field, caught.value.code) == ("prompt", "context_length_exceeded")
    assert scheduler.submit(make_request("a", 19), 0.0) == ()


def test_a_request_that_can_never_fit_the_pool_is_refused_with_the_numbers():
    scheduler = Scheduler(make_config(num_pages=4))
    with pytest.raises(InvalidRequest, match=r"takes 5 pages for 9 prompt tokens and up to 9 .* has 4 pages") as caught:
        scheduler.submit(make_request("a", 9, max_tokens=9), 0.0)
    assert caught.value.field == "max_tokens"
    with pytest.raises(InvalidRequest, match="shorten the prompt") as caught:
        scheduler.submit(make_request("a", 17, max_tokens=1), 0.0)
    assert caught.value.field == "prompt"
    assert scheduler.submit(make_request("a", 9, max_tokens=8), 0.0) == ()


def test_the_pages_of_its_adapter_count_when_a_request_is_fitted():
    scheduler = Scheduler(make_config(num_pages=4))
    scheduler.add_adapter(make_manifest("x", num_pages=3))
    with pytest.raises(InvalidRequest, match=r"takes 2 pages .* and 3 for its adapter, but the pool has 4 pages"):
        scheduler.submit(make_request("a", 4, max_tokens=5, adapter="x"), 0.0)
    assert scheduler.submit(make_request("a", 3, max_tokens=2, adapter="x"), 0.0) == ()


def test_a_request_for_an_unknown_adapter_is_refused():
    with pytest.raises(NotFound, match="adapter version x is unknown here") as caught:
        Scheduler(make_config()).submit(make_request("a", adapter="x"), 0.0)
    assert (caught.value.field, caught.value.code) == ("model", "model_not_found")


def test_a_request_id_in_use_is_refused():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a"), 0.0)
    with pytest.raises(Conflict, match="request a is unfinished here"):
        scheduler.submit(make_request("a"), 0.0)


def test_a_full_queue_refuses_new_requests_but_not_resumed_ones():
    scheduler = Scheduler(make_config(max_queued=2))
    scheduler.submit(make_request("a"), 0.0)
    scheduler.submit(make_request("b"), 0.0)
    with pytest.raises(Overloaded, match="2 requests wait already and max_queued is 2") as caught:
        scheduler.submit(make_request("c"), 0.0)
    assert caught.value.retry_after_s > 0
    assert scheduler.submit(make_request("d", epoch=1), 0.0) == ()


def test_a_refused_request_leaves_nothing_behind():
    scheduler = Scheduler(make_config(num_pages=4, max_queued=1))
    scheduler.add_adapter(make_manifest("x"))
    scheduler.submit(make_request("a"), 0.0)
    for request in (make_request("b", 100), make_request("c", adapter="x"), make_request("d", adapter="y")):
        with pytest.raises((InvalidRequest, NotFound, Overloaded)):
            scheduler.submit(request, 0.0)
    assert scheduler.stats().num_waiting == 1
    scheduler.check_integrity()
    scheduler.remove_adapter(AdapterDigest("x"))
    with pytest.raises(NotFound, match="unknown"):
        scheduler.submit(make_request("c", adapter="x", epoch=1), 0.0)


def test_the_estimate_of_a_free_place_follows_the_pace_of_the_queue():
    def wait_of(interval_s):
        scheduler = Scheduler(make_config(max_queued=50, max_sequences=1))
        for number in range(50):
            scheduler.submit(make_request(f"r{number}", 1, max_tokens=1), 0.0)
        for step in range(40):
            plan = scheduler.schedule(step * interval_s)
            scheduler.commit(plan, StepResult(plan.step, (SequenceResult((1,), 1),)))
        for number in range(40):
            scheduler.submit(make_request(f"s{number}"), 40 * interval_s)
        with pytest.raises(Overloaded) as caught:
            scheduler.submit(make_request("late"), 40 * interval_s)
        return caught.value.retry_after_s

    assert wait_of(0.5) == pytest.approx(0.5, rel=0.1)
    assert wait_of(4.0) == pytest.approx(4.0, rel=0.1)


def test_max_tokens_ends_a_stream_with_length():
    replica = Replica(make_config())
    replica.submit(make_request("a", max_tokens=3))
    replica.run()
    assert len(replica.output("a")) == 3
    assert replica.finish_reason("a") is FinishReason.LENGTH


def test_the_end_of_the_context_ends_a_stream_with_length():
    replica = Replica(make_config(max_context_tokens=8))
    replica.submit(make_request("a", 5, max_tokens=1000))
    replica.run()
    assert len(replica.output("a")) == 3
    assert replica.finish_reason("a") is FinishReason.LENGTH


def test_a_stop_token_ends_a_stream_and_is_part_of_it():
    request = make_request("a", max_tokens=50, stop=(3,))
    replica = Replica(make_config())
    replica.submit(request)
    replica.run()
    assert replica.output("a")[-1] == 3
    assert 3 not in replica.output("a")[:-1]
    assert replica.finish_reason("a") is FinishReason.STOP


def test_a_stop_token_before_min_tokens_does_not_end_a_stream():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 2, max_tokens=9, min_tokens=2, stop=(3,)), 0.0)
    reasons = []
    for num_positions in (2, 1, 1):
        plan = scheduler.schedule(0.0)
        (chunk,) = scheduler.commit(plan, StepResult(plan.step, (SequenceResult((3,), num_positions),)))
        reasons.append(chunk.finish_reason)
    assert reasons == [None, None, FinishReason.STOP]


def test_a_request_for_no_tokens_gives_its_prompt_logprobs_and_ends_with_length():
    replica = Replica(make_config(max_step_tokens=8))
    request = make_request("a", 11, max_tokens=0, prompt_logprobs=0)
    replica.submit(request)
    replica.run()
    (chunk,) = replica.chunks[RequestId("a")]
    assert chunk.token_ids == ()
    assert chunk.finish_reason is FinishReason.LENGTH
    assert chunk.prompt_logprobs == Truth(request, 1000).prompt_logprobs()
    assert not any(planned.samples for plan in replica.plans for planned in plan.sequences)


def test_tokens_sampled_for_a_request_that_wants_none_are_ignored():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 3, max_tokens=0), 0.0)
    plan = scheduler.schedule(0.0)
    (chunk,) = scheduler.commit(plan, StepResult(plan.step, (SequenceResult((5,), 3),)))
    assert (chunk.token_ids, chunk.finish_reason) == ((), FinishReason.LENGTH)


def test_the_error_of_one_sequence_ends_it_alone():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", 2), 0.0)
    scheduler.submit(make_request("b", 2), 0.0)
    plan = scheduler.schedule(0.0)
    bad, good = scheduler.commit(plan, StepResult(plan.step, (SequenceResult(error="no"), SequenceResult((1,), 2))))
    assert (bad.request_id, bad.finish_reason, bad.error) == ("a", FinishReason.ERROR, "no")
    assert (good.request_id, good.token_ids, good.finish_reason) == ("b", (1,), None)
    scheduler.check_integrity()
    assert scheduler.stats().num_running == 1


def test_a_long_prompt_is_computed_in_chunks_beside_decodes():
    replica = Replica(make_config(max_step_tokens=8))
    replica.submit(make_request("short", 3, max_tokens=20))
    replica.step()
    replica.submit(make_request("long", 20, max_tokens=2))
    shapes = [[planned.num_positions for planned in replica.step().sequences] for _ in range(4)]
    assert shapes == [[1, 7], [1, 7], [1, 6], [1, 1]]
    replica.run()
    replica.check_stream(RequestId("long"))
    replica.check_stream(RequestId("short"))


def test_prompt_logprobs_come_once_with_the_first_chunk_and_none_first():
    replica = Replica(make_config(max_step_tokens=8))
    replica.submit(make_request("a", 19, max_tokens=4, logprobs=0, prompt_logprobs=0))
    replica.run()
    first, *others = replica.chunks[RequestId("a")]
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == 19
    assert all(chunk.prompt_logprobs is None for chunk in others)
    replica.check_stream(RequestId("a"))


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt():
    replica = Replica(make_config(num_pages=8, max_step_tokens=2, max_sequences=2))
    replica.submit(make_request("old", 4, max_tokens=28))
    for _ in range(8):
        replica.step()
    replica.submit(make_request("new", 16, max_tokens=2, prompt_logprobs=0))
    replica.run()
    preempted = [plan.preempted for plan in replica.plans if plan.preempted]
    planned = [planned for plan in replica.plans for planned in plan.sequences]
    starts = [it.start for it in planned if it.request.request_id == "new"]
    assert preempted == [("new",)]
    assert starts.count(0) == 2
    assert 1 < starts.index(0, 1) < 16
    replica.check_stream(RequestId("new"))


def test_prompt_logprobs_of_positions_that_were_not_accepted_are_dropped():
    scheduler = Scheduler(make_config())
    scheduler.submit(make_request("a", (5, 6, 7), max_tokens=1, prompt_logprobs=0), 0.0)
    good, bad = (TokenLogprobs(6, -1.0), TokenLogprobs(7, -2.0)), (TokenLogprobs(6, -1.0), TokenLogprobs(7, -9.0))
    plan = scheduler.schedule(0.0)
    assert scheduler.commit(plan, StepResult(plan.step, (SequenceResult((), 1, None, bad),))) == ()
    plan = scheduler.schedule(0.0)
    (chunk,) = scheduler.commit(plan, StepResult(plan.step, (SequenceResult((1,), 2, None, good[1:]),)))
    assert chunk.prompt_logprobs == (None, *good)


def test_cached_tokens_come_with_the_first_chunk_and_never_cover_the_whole_prompt():
    replica = Replica(make_config())
    for name in ("a", "b"):
        replica.submit(make_request(name, (1, 2, 3, 4, 5, 6, 7, 8), max_tokens=3))
        replica.run()
    first, second = (replica.chunks[RequestId(name)] for name in ("a", "b"))
    assert [chunk.cached_tokens for chunk in first] == [0, None, None]
    assert [chunk.cached_tokens for chunk in second] == [PAGE_TOKENS, None, None]


def test_a_sequence_that_goes_on_from_a_cached_prefix_caches_what_follows():
    replica = Replica(make_config())
    for name, num_tokens in (("a", 6), ("b", 14), ("c", 20)):
        replica.submit(make_request(name, tuple(range(num_tokens)), max_tokens=1))
        replica.run()
    assert [replica.chunks[RequestId(name)][0].cached_tokens for name in ("a", "b", "c")] == [0, 4, 12]


def test_of_two_equal_prompts_computed_at_once_one_is_cached():
    replica = Replica(make_config())
    replica.submit(make_request("a", tuple(range(9)), max_tokens=1))
    replica.submit(make_request("b", tuple(range(9)), max_tokens=9))
    replica.run()
    assert replica.scheduler.stats().pages_prefix_cache == 2


def test_a_request_for_prompt_logprobs_looks_nothing_up_and_caches_nothing():
    replica = Replica(make_config())
    prompt = tuple(range(12))
    replica.submit(make_request("a", prompt, max_tokens=1, prompt_logprobs=0))
    replica.run()
    assert replica.scheduler.stats().pages_prefix_cache == 0
    replica.submit(make_request("b", prompt, max_tokens=1))
    replica.run()
    replica.submit(make_request("c", prompt, max_tokens=1, prompt_logprobs=0))
    replica.run()
    assert replica.chunks[RequestId("c")][0].cached_tokens == 0
    replica.check_stream(RequestId("c"))


@pytest.mark.parametrize("other", [{"tenant_salt": "other"}, {"adapter": "x"}])
def test_another_tenant_or_adapter_does_not_see_a_cached_prompt(other):
    replica = Replica(make_config())
    replica.scheduler.add_adapter(make_manifest("x"))
    replica.submit(make_request("a", tuple(range(12)), max_tokens=2))
    replica.run()
    replica.submit(make_request("b", tuple(range(12)), max_tokens=2, **other))
    replica.run()
    assert replica.chunks[RequestId("b")][0].cached_tokens == 0


def test_a_resumed_request_goes_on_at_its_offset_under_its_epoch():
    request = make_request("a", max_tokens=9, prompt_logprobs=0)
    generated = Truth(request, 1000).output[:4]
    replica = Replica(make_config())
    replica.submit(make_request("a", max_tokens=9, prompt_logprobs=0, generated=generated, epoch=2))
    replica.run()
    first = replica.chunks[RequestId("a")][0]
    assert (first.epoch, first.offset, first.prompt_logprobs) == (2, 4, None)
    replica.check_stream(RequestId("a"))


@pytest.mark.parametrize(
    ("generated", "reason"),
    [((1, 2, 3, 4), FinishReason.LENGTH), ((1, 9), FinishReason.STOP)],
)
def test_a_resumed_request_that_is_complete_ends_at_once(generated, reason):
    scheduler = Scheduler(make_config(max_queued=1))
    scheduler.submit(make_request("other"), 0.0)
    request = make_request("a", max_tokens=4, stop=(9,), generated=generated, epoch=1)
    (chunk,) = scheduler.submit(request, 0.0)
    assert (chunk.offset, chunk.token_ids, chunk.finish_reason) == (len(generated), (), reason)
    assert scheduler.stats().num_waiting == 1


def test_an_aborted_sequence_gives_its_pages_back_at_once():
    replica = Replica(make_config())
    replica.submit(make_request("a", 30))
    replica.step()
    replica.abort(RequestId("a"))
    stats = replica.scheduler.stats()
    assert (stats.pages_kv_in_use, stats.num_running) == (0, 0)
    assert replica.finish_reason("a") is FinishReason.ABORT


def test_an_aborted_sequence_in_flight_keeps_its_pages_until_its_last_plan_is_committed():
    replica = Replica(make_config(num_pages=4), depth=2)
    replica.submit(make_request("a", 5, max_tokens=10))
    replica.schedule()
    replica.schedule()
    replica.abort(RequestId("a"))
    replica.submit(make_request("b", 12, max_tokens=2))
    assert not replica.schedule().sequences
    replica.drain()
    assert replica.output("a") == ()
    assert planned_names(replica.schedule()) == ["b"]
    replica.run()
    replica.check_stream(RequestId("b"))


def test_aborting_an_unknown_request_does_nothing():
    assert Scheduler(make_config()).abort(RequestId("ghost")) == ()


def test_aborting_a_waiting_request_takes_it_off_the_queue():
    replica = Replica(make_config(max_sequences=1))
    for name in ("a", "b", "c"):
        replica.submit(make_request(name))
    replica.step()
    replica.abort(RequestId("b"))
    replica.run()
    assert replica.output("b") == ()
    replica.check_stream(RequestId("c"))


def test_the_counts_of_pages_always_add_up():
    replica = Replica(make_config(num_pages=20), depth=2, noise=Noise())
    replica.scheduler.add_adapter(make_manifest("x", num_pages=2))
    for name, adapter in (("a", None), ("b", "x"), ("c", None)):
        replica.submit(make_request(name, 9, max_tokens=12, adapter=adapter))
    while replica.scheduler.has_work:
        replica.step()
        stats = replica.scheduler.stats()
        parts = (stats.pages_free, stats.pages_kv_in_use, stats.pages_adapter, stats.pages_prefix_cache)
        assert sum(parts) == stats.pages_total == 20
        assert stats.num_running <= 3
        replica.end_all_loads()
    stats = replica.scheduler.stats()
    assert (stats.prompt_tokens_total, stats.generated_tokens_total) == (27, 36)
    assert stats.steps_total == sum(1 for plan in replica.plans if plan.sequences)
