"""A ready engine at work: requests, aborts and adapters go to it, tokens and statistics come back.

It ends with the engine, or when nobody has asked anything for long. What is open then stays with the replica.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import Never

from rekindle.clock import Clock
from rekindle.errors import StreamBroken
from rekindle.fleet.idleness import Idleness
from rekindle.fleet.known_adapters import KnownAdapters
from rekindle.fleet.link import EngineLink, EngineLost
from rekindle.fleet.open_requests import OpenRequests
from rekindle.fleet.stream import RequestStream
from rekindle.protocol.generation import AbortRequest, TokenChunk
from rekindle.protocol.identity import RequestId
from rekindle.protocol.replica import EngineFatal, EngineReady, EngineStats
from rekindle.protocol.wire import StepChunks, WireError


class EngineSession:
    """See the module. `stats` is what the engine last said, `is_fruitful` whether it has given a token. An engine that
    has work and says nothing for `silence_s` is taken for hung."""

    def __init__(
        self,
        link: EngineLink,
        ready: EngineReady,
        requests: OpenRequests,
        adapters: KnownAdapters,
        idleness: Idleness,
        clock: Clock,
        silence_s: float,
    ) -> None:
        self._link, self._requests, self._adapters, self._idleness = link, requests, adapters, idleness
        self._clock, self._silence_s = clock, silence_s
        self._aborts: deque[RequestId] = deque()
        self._has_news, self._has_running = asyncio.Event(), asyncio.Event()
        self._last_sign_s = 0.0
        self.ready = ready
        self.stats: EngineStats | None = None
        self.is_fruitful = False

    @property
    def pid(self) -> int:
        return self._link.pid

    def note_news(self) -> None:
        """There are requests or adapters that the engine may not know of."""
        self._has_news.set()

    def abort(self, request_id: RequestId) -> None:
        """Let the engine forget a request."""
        self._aborts.append(request_id)
        self._has_news.set()

    async def run(self) -> None:
        """Exchange messages until nobody has asked anything for long.

        Raises:
            EngineLost: the engine has died, or must.
        """
        self._has_news.set()
        if not len(self._requests):
            self._idleness.begin()
        lost: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(work) for work in (self._receive(), self._send(), self._watch())]
                await self._idleness.until_long()
                for task in tasks:
                    task.cancel()
        except* EngineLost as losses:
            lost = losses.exceptions[0]
        if lost is not None:
            raise lost

    async def _receive(self) -> Never:
        while True:
            message = await self._link.receive()
            self._last_sign_s = self._clock.monotonic_s()
            match message:
                case StepChunks(chunks):
                    for chunk in chunks:
                        self._deliver(chunk)
                case EngineStats():
                    self.stats = message
                case EngineFatal(reason):
                    raise EngineLost(reason)
                case _:
                    raise EngineLost(f"the engine sent an unexpected {type(message).__name__}")

    def _deliver(self, chunk: TokenChunk) -> None:
        stream = self._requests.get(chunk.request_id)
        if stream is None:
            return
        try:
            num_new = stream.push(chunk)
        except StreamBroken as error:
            stream.fail(error)
            num_new = 0
        self.is_fruitful |= num_new > 0
        if (num_new or stream.is_over) and self._requests.note_progress(stream):
            self._has_news.set()

    async def _send(self) -> None:
        """Bring the engine up to date whenever something has changed, waiting while it takes nothing."""
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            while self._aborts:
                await self._link.send(AbortRequest(self._aborts.popleft()))
            while (adapter_change := self._adapters.take_next()) is not None:
                await self._link.send(adapter_change)
            was_idle = not self._requests.has_running
            if (stream := self._requests.take_next()) is not None:
                if was_idle:
                    self._last_sign_s = self._clock.monotonic_s()
                    self._has_running.set()
                await self._submit(stream)
                self._has_news.set()

    async def _submit(self, stream: RequestStream) -> None:
        try:
            await self._link.send(replace(stream.request, waited_s=self._clock.monotonic_s() - stream.opened_s))
        except WireError as error:
            stream.fail(error)
            self._requests.note_progress(stream)

    async def _watch(self) -> None:
        """Raise EngineLost when an engine that has work gives no sign of life.

        Silence counts from the last frame, or from the moment an idle engine was given work.
        """
        while True:
            await self._has_running.wait()
            left_s = self._last_sign_s + self._silence_s - self._clock.monotonic_s()
            if left_s > 0:
                await asyncio.sleep(left_s)
            elif self._requests.has_running:
                raise EngineLost(f"engine process {self.pid} has given no sign of life for {self._silence_s:g} s")
            else:
                self._has_running.clear()
