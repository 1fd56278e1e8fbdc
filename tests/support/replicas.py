"""Replicas over fake engines, and requests driven through them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rekindle.clock import SystemClock
from rekindle.fleet.launch import CommandLauncher
from rekindle.fleet.replica import Replica
from rekindle.fleet.supervision import Supervision
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest, ModelDigest, RequestId
from rekindle.protocol.models import ModelManifest
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.testing.fake_engine import Faults, fake_engine_command

MODEL = ModelManifest(ModelDigest("0" * 64), "llama", "F32", 1, 4, 1, 1000, 4096, (2,), True, ())
ADAPTER = AdapterManifest(AdapterDigest("a" * 64), MODEL.digest, "F32", 64, (8,), ("q_proj",), ())
QUICK = Supervision(start_s=30.0, silence_s=30.0, backoff_s=0.01, max_backoff_s=0.05)


def engine_settings(**changes: object) -> EngineSettings:
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


def request(
    name: str,
    max_tokens: int = 40,
    prompt: tuple[int, ...] = (1, 2, 3),
    adapter: AdapterDigest | None = None,
    **sampling: object,
) -> GenerateRequest:
    settings = SamplingParams(max_tokens=max_tokens, seed=0, **sampling)  # type: ignore[arg-type]
    return GenerateRequest(RequestId(name), prompt, settings, adapter=adapter)


@asynccontextmanager
async def running(
    faults: Faults | None = None, supervision: Supervision = QUICK, **settings: object
) -> AsyncIterator[Replica]:
    """A replica over a fake engine, started, and stopped in the end."""
    command = fake_engine_command(faults)
    replica = Replica(
        engine_settings(**settings), SystemClock(), supervision=supervision, launcher=CommandLauncher(command)
    )
    await replica.start()
    try:
        yield replica
    finally:
        await replica.stop()


async def collect(replica: Replica, wanted: GenerateRequest) -> list[TokenChunk]:
    return await _collect(replica.generate(wanted))


class Reading:
    """A stream that has begun: its first chunk has arrived, and `rest` reads all others in the background."""

    def __init__(self, first: TokenChunk, rest: asyncio.Task[list[TokenChunk]]) -> None:
        self._first, self.rest = first, rest

    async def all(self) -> list[TokenChunk]:
        return [self._first, *await self.rest]


async def begin(replica: Replica, wanted: GenerateRequest) -> Reading:
    """Submit a request, and read on in the background once its first tokens have come."""
    stream = replica.generate(wanted)
    first = await anext(stream)
    return Reading(first, asyncio.create_task(_collect(stream)))


async def _collect(stream: AsyncIterator[TokenChunk]) -> list[TokenChunk]:
    return [chunk async for chunk in stream]


def tokens_of(chunks: list[TokenChunk]) -> tuple[int, ...]:
    return tuple(token for chunk in chunks for token in chunk.token_ids)


async def until(condition: Callable[[], bool], what: str, limit_s: float = 30.0) -> None:
    """Wait for something that must come about; that it does not is a failure, not a matter of speed."""
    try:
        async with asyncio.timeout(limit_s):
            while not condition():
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"waited {limit_s:g} s in vain: {what}") from None
