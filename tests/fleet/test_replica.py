"""Supervision of engine processes: streams survive their engine, and nothing is left behind."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rekindle.clock import SystemClock
from rekindle.errors import ConfigurationError, EngineFailed, NotFound, Overloaded, ReplicaUnavailable
from rekindle.fleet.replica import ENGINE_COMMAND, Replica, ReplicaState, Supervision
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest, ModelDigest, RequestId
from rekindle.protocol.models import ModelManifest
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.testing.fake_engine import expected_tokens, fake_engine_command

MODEL = ModelManifest(ModelDigest("0" * 64), "llama", "F32", 1, 4, 1, 1000, 4096, (2,), True, ())
ADAPTER = AdapterManifest(AdapterDigest("a" * 64), MODEL.digest, "F32", 64, (8,), ("q_proj",), ())
QUICK = Supervision(start_s=30.0, silence_s=1.0, backoff_s=0.01, max_backoff_s=0.05)


def settings(**changes: object) -> EngineSettings:
    values = {
        "model_dir": "/nonexistent",
        "model": MODEL,
        "dtype": "float32",
        "memory_bytes": 1 << 20,
        "page_tokens": 16,
        "max_step_tokens": 64,
        "max_sequences": 64,
        "max_queued": 64,
        "num_threads": 1,
        **changes,
    }
    return EngineSettings(**values)  # type: ignore[arg-type]


def request(name: str, num_tokens: int = 40, prompt: tuple[int, ...] = (1, 2, 3), **changes: object) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=num_tokens, seed=0, **changes)  # type: ignore[arg-type]
    return GenerateRequest(RequestId(name), (*prompt, len(name)), sampling)


@asynccontextmanager
async def running(*faults: str, **changes: object) -> AsyncIterator[Replica]:
    replica = Replica(settings(**changes), SystemClock(), supervision=QUICK, command=fake_engine_command(*faults))
    await replica.start()
    try:
        yield replica
    finally:
        await replica.stop()


async def collect(replica: Replica, wanted: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in replica.generate(wanted)]


def tokens_of(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


async def all_running(replica: Replica) -> None:
    """Wait until every open request has made progress on the present engine."""
    while not replica.is_ready or replica._suspects or not all(s.is_submitted for s in replica._streams.values()):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)


def engine_pid(replica: Replica) -> int:
    assert replica._link is not None
    return replica._link.pid


async def test_a_stream_is_what_the_engine_generates() -> None:
    async with running() as replica:
        wanted = request("r")
        chunks = await collect(replica, wanted)
        assert tokens_of(chunks) == expected_tokens(wanted)
        assert chunks[-1].finish_reason == "length"
        assert [chunk.offset for chunk in chunks] == sorted(chunk.offset for chunk in chunks)


async def test_fifty_streams_survive_repeated_kills_unbroken() -> None:
    async with running("--step-s", "0.01") as replica:
        requests = [request(f"r{i}", 30 + i, (i,), logprobs=0, prompt_logprobs=0) for i in range(50)]
        streams = [asyncio.create_task(collect(replica, wanted)) for wanted in requests]
        for num_kills in range(3):
            while replica.restarts_total < num_kills:
                await asyncio.sleep(0.01)
            await all_running(replica)
            os.kill(engine_pid(replica), signal.SIGKILL)
        for wanted, stream in zip(requests, streams, strict=True):
            chunks = await stream
            assert tokens_of(chunks) == expected_tokens(wanted)
            logprobs = [entry.logprob for chunk in chunks for entry in chunk.logprobs or ()]
            assert logprobs == [-float(position) for position in range(wanted.sampling.max_tokens)]
            assert sum(chunk.prompt_logprobs is not None for chunk in chunks) == 1
            assert sum(chunk.cached_tokens is not None for chunk in chunks) == 1
        assert replica.restarts_total == 3


async def test_a_request_that_kills_the_engine_fails_and_the_others_complete() -> None:
    async with running("--poison", "666") as replica:
        good = [request(f"good{i}", 60, (i,)) for i in range(8)]
        tasks = [asyncio.create_task(collect(replica, wanted)) for wanted in good[:4]]
        await asyncio.sleep(0.01)
        poison = asyncio.create_task(collect(replica, request("bad", prompt=(666,))))
        tasks += [asyncio.create_task(collect(replica, wanted)) for wanted in good[4:]]
        with pytest.raises(EngineFailed, match="twice"):
            await poison
        for wanted, task in zip(good, tasks, strict=True):
            assert tokens_of(await task) == expected_tokens(wanted)


async def test_an_engine_that_hangs_is_killed_and_its_streams_go_on() -> None:
    async with running("--hang-at-step", "25") as replica:
        wanted = request("r", 40)
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        assert replica.restarts_total == 1


async def test_adapters_are_known_to_the_next_engine_too() -> None:
    async with running() as replica:
        wanted = GenerateRequest(RequestId("a"), (1,), SamplingParams(max_tokens=5, seed=0), adapter=ADAPTER.digest)
        with pytest.raises(NotFound):
            await collect(replica, wanted)
        await replica.add_adapter(ADAPTER, Path("/nonexistent"))
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        os.kill(engine_pid(replica), signal.SIGKILL)
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        await replica.remove_adapter(ADAPTER.digest)
        with pytest.raises(NotFound):
            await collect(replica, wanted)


async def test_closing_a_stream_aborts_its_sequence() -> None:
    async with running("--step-s", "0.01") as replica:
        stream = replica.generate(request("r", 3000))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(5):
            while replica.stats is None or replica.stats.num_running or replica.stats.steps_total == 0:
                await asyncio.sleep(0.05)


async def test_more_requests_than_may_wait_are_turned_away() -> None:
    async with running("--step-s", "0.05", max_queued=1, max_sequences=1) as replica:
        streams = [replica.generate(request(f"r{i}", 50)) for i in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(Overloaded, match="2 requests are open, at most 2") as caught:
            await anext(replica.generate(request("late")))
        assert caught.value.retry_after_s > 0
        for stream in streams:
            await stream.aclose()


async def test_a_slow_reader_gets_everything_in_few_chunks() -> None:
    async with running() as replica:
        wanted = request("slow", 2000, logprobs=0)
        stream = replica.generate(wanted)
        chunks = [await anext(stream)]
        await asyncio.sleep(0.5)
        chunks += [chunk async for chunk in stream]
        assert tokens_of(chunks) == expected_tokens(wanted)
        assert sum(len(chunk.logprobs or ()) for chunk in chunks) == 2000
        assert len(chunks) < 1900


async def test_draining_finishes_open_streams_and_takes_no_new_ones() -> None:
    async with running("--step-s", "0.005") as replica:
        wanted = request("open", 40)
        stream = asyncio.create_task(collect(replica, wanted))
        await asyncio.sleep(0.02)
        drained = asyncio.create_task(replica.drain(10.0))
        await asyncio.sleep(0)
        with pytest.raises(ReplicaUnavailable):
            await collect(replica, request("late"))
        await drained
        assert tokens_of(await stream) == expected_tokens(wanted)


async def test_stopping_fails_open_streams_and_leaves_nothing_behind() -> None:
    async with running():
        pass
    before = len(os.listdir("/proc/self/fd"))
    async with running("--step-s", "0.01") as replica:
        pid = engine_pid(replica)
        stream = asyncio.create_task(collect(replica, request("open", 1000)))
        await asyncio.sleep(0.05)
    with pytest.raises(ReplicaUnavailable):
        await stream
    assert not Path(f"/proc/{pid}").exists()
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(asyncio.all_tasks()) == 1


async def test_an_engine_that_keeps_failing_makes_the_replica_unavailable_but_not_dead() -> None:
    async with running("--crash-at-step", "1") as replica:
        with pytest.raises(EngineFailed):
            await collect(replica, request("a"))
        for i in range(20):
            try:
                await asyncio.wait_for(collect(replica, request(f"b{i}")), 5)
            except EngineFailed:
                continue
            except ReplicaUnavailable as error:
                assert error.retry_after_s > 0
                return
        raise AssertionError("the replica never said that it is unavailable")


async def test_settings_no_engine_can_start_with_are_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    replica = Replica(settings(dtype="int3"), SystemClock(), supervision=QUICK, command=ENGINE_COMMAND)
    with pytest.raises(ConfigurationError, match="int3"):
        await replica.start()
    assert replica.state is ReplicaState.STOPPED


async def test_the_engine_dies_with_its_parent() -> None:
    script = (
        "import asyncio, os, sys; sys.path.insert(0, 'tests/fleet')\n"
        "from test_replica import *\n"
        "async def main():\n"
        "    async with running() as replica:\n"
        "        print(engine_pid(replica), flush=True); os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        os.sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    output, _ = await parent.communicate()
    async with asyncio.timeout(5):
        while Path(f"/proc/{int(output)}").exists():
            await asyncio.sleep(0.05)
