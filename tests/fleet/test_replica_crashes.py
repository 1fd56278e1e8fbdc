"""Streams survive the death of their engine, whatever kills it and whenever."""

import asyncio
import logging
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from rekindle.errors import EngineFailed, NotFound, ReplicaUnavailable, StreamBroken
from rekindle.fleet.link import EngineLink
from rekindle.fleet.replica import Replica
from rekindle.fleet.state import ReplicaState
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenChunk
from rekindle.testing.fake_engine import Faults, expected_tokens
from support.replicas import ADAPTER, QUICK, begin, collect, request, running, tokens_of, until

SLOW = Faults(step_s=0.01)
PATIENT = replace(QUICK, max_crashes_per_request=100)


def kill(replica: Replica) -> None:
    assert replica.engine_pid is not None
    os.kill(replica.engine_pid, signal.SIGKILL)


async def kill_and_wait(replica: Replica) -> None:
    """Kill the engine and wait until the next one is ready."""
    num_before = replica.restarts_total
    kill(replica)
    await until(lambda: replica.restarts_total > num_before and replica.is_ready, "another engine is ready")


def assert_complete(wanted: GenerateRequest, chunks: list[TokenChunk]) -> None:
    """Every token and score exactly once, in order, and one end."""
    assert tokens_of(chunks) == expected_tokens(wanted)
    offset = 0
    for chunk in chunks:
        assert chunk.offset == offset
        offset += len(chunk.token_ids)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [FinishReason.LENGTH]
    if wanted.sampling.logprobs is not None:
        scores = [score.logprob for chunk in chunks for score in chunk.logprobs or ()]
        assert scores == [-float(position) for position in range(offset)]
    num_prompt_scores = sum(chunk.prompt_logprobs is not None for chunk in chunks)
    assert num_prompt_scores == (wanted.sampling.prompt_logprobs is not None)
    assert sum(chunk.cached_tokens is not None for chunk in chunks) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_fifty_streams_are_unbroken_across_kills_at_random_moments(seed: int) -> None:
    randomness = random.Random(seed)
    async with running(SLOW, PATIENT) as replica:
        wanted = [request(f"r{i}", 40 + i, (i,), logprobs=1, prompt_logprobs=0) for i in range(50)]
        streams = [asyncio.create_task(collect(replica, each)) for each in wanted]
        for _ in range(3):
            await asyncio.sleep(randomness.uniform(0, 0.3))
            await until(lambda: replica.is_ready, "an engine is ready")
            kill(replica)
        for each, stream in zip(wanted, streams, strict=True):
            assert_complete(each, await stream)
        assert replica.restarts_total >= 1


async def test_requests_that_come_while_there_is_no_engine_wait_for_the_next() -> None:
    async with running(SLOW) as replica:
        first = request("first", 30)
        stream = replica.generate(first)
        chunks = [await anext(stream)]
        kill(replica)
        await until(lambda: replica.state is ReplicaState.RESTARTING, "the death is noticed")
        assert replica.ready is None
        assert replica.stats is None
        second = request("second", 10, (9,))
        later = asyncio.create_task(collect(replica, second))
        chunks += [chunk async for chunk in stream]
        assert_complete(first, chunks)
        assert_complete(second, await later)


async def test_a_request_that_kills_engines_fails_after_two_and_all_others_complete() -> None:
    async with running(Faults(poison=666, step_s=0.002)) as replica:
        wanted = [request(f"good{i}", 60, (i,)) for i in range(20)]
        before = [(await begin(replica, each)).all() for each in wanted[:10]]
        poison = asyncio.create_task(collect(replica, request("bad", 10, (1, 666))))
        after = [asyncio.create_task(collect(replica, each)) for each in wanted[10:]]
        with pytest.raises(EngineFailed, match=r"died 2 times while it computed this request.*SIGKILL"):
            await poison
        for each, stream in zip(wanted, before + after, strict=True):
            assert_complete(each, await stream)
        assert replica.restarts_total == 2


async def test_a_stream_present_at_two_kills_fails_after_the_tokens_it_had() -> None:
    async with running(SLOW) as replica:
        wanted = request("r", 2000)
        stream = replica.generate(wanted)
        received: list[TokenChunk] = [await anext(stream)]
        await kill_and_wait(replica)
        num_before = len(tokens_of(received))
        while len(tokens_of(received)) < num_before + 20:
            received.append(await anext(stream))
        kill(replica)
        with pytest.raises(EngineFailed, match="died 2 times"):
            while True:
                received.append(await anext(stream))
        tokens = tokens_of(received)
        assert tokens == expected_tokens(wanted)[: len(tokens)]


async def test_an_engine_that_hangs_is_killed_and_its_streams_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = Faults(hang_at_step=5, marker=str(tmp_path / "hung"))
    async with running(faults, replace(QUICK, silence_s=0.3)) as replica:
        wanted = request("r")
        assert_complete(wanted, await collect(replica, wanted))
        assert replica.restarts_total == 1
        assert "no sign of life for 0.3 s" in caplog.text


async def test_an_idle_engine_may_be_silent() -> None:
    async with running(supervision=replace(QUICK, silence_s=0.1)) as replica:
        for i in range(3):
            wanted = request(f"r{i}")
            assert_complete(wanted, await collect(replica, wanted))
            await asyncio.sleep(0.25)
        assert replica.restarts_total == 0


async def test_adapters_are_known_to_the_next_engine_even_those_removed_while_in_use() -> None:
    async with running(SLOW) as replica:
        wanted = request("a", 40, adapter=ADAPTER.digest)
        with pytest.raises(NotFound, match="unknown here"):
            await collect(replica, wanted)
        await replica.add_adapter(ADAPTER, Path("/nonexistent"))
        stream = replica.generate(wanted)
        chunks = [await anext(stream)]
        await replica.remove_adapter(ADAPTER.digest)
        with pytest.raises(NotFound, match="removed"):
            await collect(replica, request("b", adapter=ADAPTER.digest))
        await kill_and_wait(replica)
        chunks += [chunk async for chunk in stream]
        assert_complete(wanted, chunks)
        with pytest.raises(NotFound, match="unknown here"):
            await collect(replica, wanted)
        await replica.add_adapter(ADAPTER, Path("/nonexistent"))
        assert_complete(wanted, await collect(replica, wanted))


async def test_engines_that_keep_dying_make_the_replica_unavailable_until_one_lives() -> None:
    supervision = replace(QUICK, max_fruitless_crashes=3, max_backoff_s=0.2, max_crashes_per_request=10)
    async with running(Faults(poison=666), supervision) as replica:
        with pytest.raises(ReplicaUnavailable, match="several times in a row") as met:
            await collect(replica, request("bad", 10, (666,)))
        assert met.value.retry_after_s > 0
        if replica.state is ReplicaState.RESTARTING:
            with pytest.raises(ReplicaUnavailable, match="several times in a row"):
                await collect(replica, request("early"))
        await until(lambda: replica.is_ready, "an engine lives again")
        wanted = request("good")
        assert_complete(wanted, await collect(replica, wanted))


async def test_an_engine_killed_while_idle_is_replaced_and_nobody_is_refused() -> None:
    async with running(supervision=replace(QUICK, max_fruitless_crashes=3)) as replica:
        for _ in range(5):
            await kill_and_wait(replica)
        wanted = request("r")
        assert_complete(wanted, await collect(replica, wanted))


async def test_a_fault_in_supervision_replaces_the_engine_instead_of_ending_the_replica(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receive = EngineLink.receive
    faults = iter([False, False, False, True])

    async def failing(link: EngineLink) -> object:
        message = await receive(link)
        if next(faults, False):
            raise KeyError("a fault of ours")
        return message

    monkeypatch.setattr(EngineLink, "receive", failing)
    with caplog.at_level(logging.ERROR):
        async with running(SLOW) as replica:
            wanted = request("r", 20)
            assert_complete(wanted, await collect(replica, wanted))
            assert replica.restarts_total == 1
    assert "unexpected error in supervision" in caplog.text


async def test_an_engine_that_leaves_out_tokens_breaks_only_that_stream() -> None:
    async with running(SLOW) as replica:
        good, bad = request("good", 30, (1,)), request("bad", 30, (2,))
        other = asyncio.create_task(collect(replica, good))
        stream = replica.generate(bad)
        first = await anext(stream)
        lost = TokenChunk(bad.request_id, 0, first.offset + len(first.token_ids) + 25, (1,))
        replica._session._deliver(lost)  # type: ignore[union-attr]
        with pytest.raises(StreamBroken, match="a chunk begins at token"):
            async for _ in stream:
                continue
        assert_complete(good, await other)
