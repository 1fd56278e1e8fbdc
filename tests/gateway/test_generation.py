"""Sequences side by side: order, merging, faults; and one choice's tokens on their way to text."""

from __future__ import annotations

import asyncio

import pytest

from rekindle.clock import ManualClock
from rekindle.errors import EngineFailed, StreamBroken
from rekindle.gateway.choice import Choice, OutputOptions
from rekindle.gateway.generation import Generation
from rekindle.gateway.metrics import GatewayMetrics
from rekindle.gateway.text import Tokenizer
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import RequestId
from rekindle.protocol.sampling import SamplingParams


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return Tokenizer.from_directory(model_dir)


def chunk(offset: int, *ids: int, finish: FinishReason | None = None, **extra) -> TokenChunk:
    return TokenChunk(RequestId("r"), 0, offset, ids, finish, **extra)


@pytest.fixture
def run(make_services, tokenizer):
    services = make_services()
    replica = services.bases[0].replica

    def run(num_choices: int = 1) -> tuple[Generation, list[Choice]]:
        choices = [Choice(index, tokenizer, OutputOptions()) for index in range(num_choices)]
        sampling = SamplingParams(max_tokens=400, seed=0)
        sequences = [(GenerateRequest(RequestId(f"r-{c.index}"), (1,), sampling), c) for c in choices]
        observer = GatewayMetrics(services.bases, ManualClock())
        with observer.observe("m", None, num_choices) as request:
            return Generation(replica, sequences, request), choices

    run.replica = replica
    return run


async def test_what_arrived_meanwhile_is_handed_over_as_one_delta_for_each_choice(run):
    run.replica.say("the quick brown fox")
    generation, _ = run(num_choices=2)
    async with generation:
        for _ in range(100):
            await asyncio.sleep(0)
        deltas = await generation.next_deltas()
        assert {(delta.index, delta.text, delta.finish_reason) for delta in deltas} == {
            (0, "the quick brown fox", FinishReason.LENGTH),
            (1, "the quick brown fox", FinishReason.LENGTH),
        }
        assert len(deltas) == 2
        assert await generation.next_deltas() == []


async def test_a_fault_of_one_sequence_ends_the_request_and_aborts_the_others(run):
    run.replica.hold_after = 3
    run.replica.failure_after = (2, EngineFailed("lost"))
    generation, _ = run(num_choices=3)
    with pytest.raises(EngineFailed, match="lost"):
        async with generation:
            while await generation.next_deltas():
                pass
    assert run.replica.active == set()


async def test_text_that_arrived_before_a_fault_is_handed_over_and_then_the_fault(run):
    run.replica.failure_after = (2, EngineFailed("lost"))
    generation, _ = run()
    async with generation:
        for _ in range(100):
            await asyncio.sleep(0)
        first_two = run.replica.tokenizer.decode(run.replica.encode("the quick brown fox")[:2])
        assert [delta.text for delta in await generation.next_deltas()] == [first_two]
        for _ in range(2):
            with pytest.raises(EngineFailed, match="lost"):
                await generation.next_deltas()


async def test_leaving_early_aborts_what_still_runs(run):
    run.replica.hold_after = 1
    generation, _ = run(num_choices=2)
    async with generation:
        await generation.next_deltas()
    assert run.replica.active == set()
    assert len(run.replica.aborted) == 2


async def test_a_stream_that_ends_before_its_sequence_is_broken(run):
    class Silent:
        async def generate(self, request):
            yield chunk(0, 5)

    generation, _ = run()
    generation._replica = Silent()
    with pytest.raises(StreamBroken, match="ended before"):
        async with generation:
            while await generation.next_deltas():
                pass


def test_a_gap_or_a_repetition_in_the_tokens_is_an_error(tokenizer):
    for offset in (0, 3):
        choice = Choice(0, tokenizer, OutputOptions())
        choice.feed(chunk(0, 5, 6))
        with pytest.raises(StreamBroken):
            choice.feed(chunk(offset, 7))


@pytest.mark.parametrize("finish", [FinishReason.ERROR, FinishReason.ABORT])
def test_a_sequence_the_engine_gave_up_is_an_error_with_its_reason(tokenizer, finish):
    with pytest.raises(EngineFailed, match="out of pages"):
        Choice(0, tokenizer, OutputOptions()).feed(chunk(0, finish=finish, error="out of pages"))


def test_a_stop_token_is_counted_but_neither_shown_nor_scored(tokenizer):
    choice = Choice(0, tokenizer, OutputOptions())
    scores = (TokenLogprobs(70, -1.0), TokenLogprobs(71, -1.0))
    delta = choice.feed(chunk(0, 70, 71, finish=FinishReason.STOP, logprobs=scores))
    assert delta.text == tokenizer.token_text(70)
    assert [token.token_id for token in delta.tokens] == [70]
    assert choice.num_tokens == 2


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(tokenizer):
    ids = [tokenizer._tokenizer.token_to_id(char) for char in "ab"]
    choice = Choice(0, tokenizer, OutputOptions(stops=("abc",)))
    assert choice.feed(chunk(0, *ids)) is None
    assert choice.feed(chunk(2, finish=FinishReason.LENGTH)).text == "ab"


def test_tokens_after_a_stop_string_in_the_same_chunk_do_not_count(tokenizer):
    ids = [tokenizer._tokenizer.token_to_id(char) for char in "xabyz"]
    choice = Choice(0, tokenizer, OutputOptions(stops=("ab",)))
    delta = choice.feed(chunk(0, *ids, finish=FinishReason.LENGTH))
    assert (delta.text, delta.finish_reason, choice.num_tokens) == ("x", FinishReason.STOP, 3)
