"""A stream gives every token once, whatever the chunks it arrives in."""

import asyncio
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.errors import EngineFailed, InvalidRequest, NotFound, Overloaded, RekindleError, StreamBroken
from rekindle.fleet.stream import RequestStream, error_of
from rekindle.protocol.generation import FinishReason, Refusal, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import RequestId
from support.replicas import request

NAME = RequestId("r")


def chunk(offset: int, length: int, epoch: int = 0, last: bool = False) -> TokenChunk:
    tokens = tuple(range(offset, offset + length))
    reason = FinishReason.LENGTH if last else None
    scores = tuple(TokenLogprobs(token, -1.0) for token in tokens)
    return TokenChunk(
        NAME,
        epoch,
        offset,
        tokens,
        reason,
        scores,
        prompt_logprobs=(None,) if offset == 0 and length else None,
        cached_tokens=epoch,
    )


def take(stream: RequestStream) -> TokenChunk:
    return asyncio.run(asyncio.wait_for(stream.take(), 1.0))


EVENTS = st.lists(st.tuples(st.sampled_from(["push", "crash", "stale", "take"]), st.randoms()), max_size=30)


@given(st.integers(1, 30), EVENTS)
def test_tokens_come_once_and_in_order_across_epochs_overlaps_and_slow_readers(
    total: int, events: list[tuple[str, Random]]
) -> None:
    stream = RequestStream(request("r", total, logprobs=0, prompt_logprobs=0))
    received: list[TokenChunk] = []
    known = taken = epoch = 0
    for event, randomness in events:
        if event == "crash":
            stream.begin_epoch()
            epoch += 1
            assert stream.request.epoch == epoch
            assert stream.request.generated_token_ids == tuple(range(known))
            assert (stream.request.sampling.prompt_logprobs is None) == (known > 0)
        elif event == "stale" and epoch:
            assert stream.push(chunk(known, 1, epoch - 1)) == 0
        elif event == "take" and known > taken:
            received.append(take(stream))
            taken = known
        elif event == "push":
            start = randomness.randint(0, known)
            end = randomness.randint(start, total - 1)
            assert stream.push(chunk(start, end - start, epoch)) == max(0, end - known)
            known = max(known, end)
    stream.push(chunk(known, total - known, epoch, last=True))
    received.append(take(stream))
    assert [token for each in received for token in each.token_ids] == list(range(total))
    assert [score.token_id for each in received for score in each.logprobs or ()] == list(range(total))
    assert sum(each.prompt_logprobs is not None for each in received) == 1
    assert sum(each.cached_tokens is not None for each in received) == 1
    assert received[-1].finish_reason is FinishReason.LENGTH


def test_a_gap_is_refused_with_the_places_and_changes_nothing() -> None:
    stream = RequestStream(request("r"))
    stream.push(chunk(0, 2))
    with pytest.raises(StreamBroken, match="begins at token 5, but only the tokens before 2"):
        stream.push(chunk(5, 1))
    assert stream.request.generated_token_ids == (0, 1)


def test_log_probabilities_of_another_length_than_the_tokens_are_refused() -> None:
    stream = RequestStream(request("r", logprobs=0))
    with pytest.raises(StreamBroken, match="0 log-probabilities came with 1 tokens"):
        stream.push(TokenChunk(NAME, 0, 0, (5,), logprobs=()))


def test_a_failure_comes_after_the_tokens_that_arrived_before_it() -> None:
    stream = RequestStream(request("r"))
    stream.push(chunk(0, 3))
    stream.push(TokenChunk(NAME, 0, 3, (), FinishReason.ERROR, error="out of memory"))
    first = take(stream)
    assert first.token_ids == (0, 1, 2)
    assert first.finish_reason is None
    with pytest.raises(EngineFailed, match="out of memory"):
        take(stream)


def test_the_first_end_of_a_stream_counts() -> None:
    stream = RequestStream(request("r"))
    stream.push(chunk(0, 1, last=True))
    stream.fail(EngineFailed("too late"))
    assert stream.push(chunk(1, 1)) == 0
    assert take(stream).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (Refusal("InvalidRequest", field="prompt", code="too_long"), InvalidRequest),
        (Refusal("NotFound", field="model"), NotFound),
        (Refusal("Overloaded", retry_after_s=3.0), Overloaded),
        (Refusal("Path"), EngineFailed),
        (Refusal("annotations"), EngineFailed),
        (Refusal("RekindleError"), EngineFailed),
        (None, EngineFailed),
    ],
)
def test_a_refusal_becomes_the_error_it_names_and_nothing_else(refusal: Refusal | None, kind: type) -> None:
    error: RekindleError = error_of(TokenChunk(NAME, 0, 0, (), FinishReason.ERROR, error="because", refusal=refusal))
    assert type(error) is kind
    assert str(error) == "because"
    if refusal is not None:
        for name in ("field", "code", "retry_after_s"):
            assert getattr(error, name, None) == getattr(refusal, name)
