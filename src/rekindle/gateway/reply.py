"""Answers a generation request: starts its sequences, sends what they give, stops them when the client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rekindle.errors import InternalError, RekindleError
from rekindle.gateway.adapter_versions import AdapterVersions
from rekindle.gateway.choice import Choice, Delta
from rekindle.gateway.encoders import DONE, Outcome, ReplyEncoder, Usage
from rekindle.gateway.generation import Generation
from rekindle.gateway.http_errors import body_of
from rekindle.gateway.lifecycle import Lifecycle
from rekindle.gateway.metrics import GatewayMetrics, RequestObserver
from rekindle.gateway.seams import RegisteredAdapter, ServedBase
from rekindle.gateway.settings import GatewaySettings
from rekindle.protocol.generation import GenerateRequest

logger = logging.getLogger(__name__)

EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_COMMENT = b": waiting\n\n"
JSON_HEADERS = [(b"content-type", b"application/json")]


class _ClientStalled(Exception):
    """The client has stopped reading; its connection is given up."""


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A checked request, ready to run. `prompt_tokens` counts each prompt once; sequences of one prompt follow one
    another, `choices_per_prompt` at a time."""

    base: ServedBase
    adapter: RegisteredAdapter | None
    sequences: tuple[tuple[GenerateRequest, Choice], ...]
    encoder: ReplyEncoder
    prompt_tokens: int
    choices_per_prompt: int
    stream: bool
    include_usage: bool

    def usage(self) -> Usage:
        choices = [choice for _, choice in self.sequences]
        first_of_prompts = choices[:: self.choices_per_prompt]
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=sum(choice.num_tokens for choice in choices),
            cached_tokens=sum(choice.cached_tokens for choice in first_of_prompts),
        )


@dataclass(frozen=True, slots=True)
class JobRunner:
    """What running a job takes."""

    versions: AdapterVersions
    metrics: GatewayMetrics
    lifecycle: Lifecycle
    settings: GatewaySettings

    @asynccontextmanager
    async def start(self, job: GenerationJob) -> AsyncIterator[tuple[Generation, RequestObserver]]:
        """Run a job while the context lasts; the adapter's version stays with the replica as long."""
        adapter = job.adapter
        async with AsyncExitStack() as stack:
            stack.enter_context(self.lifecycle.work(self.settings.retry_after_s))
            observer = stack.enter_context(
                self.metrics.observe(job.base.name, adapter.name if adapter else None, len(job.sequences))
            )
            if adapter is not None:
                await stack.enter_async_context(self.versions.lease(job.base, adapter))
            generation = await stack.enter_async_context(Generation(job.base.replica, job.sequences, observer))
            yield generation, observer


class GenerationReply(Response):
    """The response to a job. Until the first tokens have arrived nothing is sent, so that a full queue or a dead
    engine is still answered with its own status; later errors become an event of the stream. Where the first tokens
    are long in coming, as from a model that is being woken, a stream begins with comments, which clients skip: nobody
    on the way then takes the connection for dead."""

    def __init__(self, job: GenerationJob, runner: JobRunner) -> None:
        super().__init__()
        self._job = job
        self._runner = runner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._answer(send))
        except _ClientStalled:
            logger.info("a client left its answer unread for %.0f s", self._runner.settings.send_timeout_s)

    async def _answer(self, send: Send) -> None:
        async with self._runner.start(self._job) as (generation, observer):
            if self._job.stream:
                await self._stream(generation, observer, send)
            else:
                deltas = await generation.next_deltas()
                observer.admitted(self._job.prompt_tokens)
                await self._whole(deltas, generation, observer, send)

    async def _stream(self, generation: Generation, observer: RequestObserver, send: Send) -> None:
        job, encoder = self._job, self._job.encoder
        first = await self._first_deltas(generation, send)
        pending = encoder.opening(len(job.sequences))
        try:
            deltas = first.result()
            observer.admitted(job.prompt_tokens)
            while deltas:
                events = [encoder.event(delta, job.sequences[delta.index][1].prompt_logprobs) for delta in deltas]
                _note_finished(deltas, observer)
                await self._send(send, pending + b"".join(events))
                pending = b""
                deltas = await generation.next_deltas()
            tail = encoder.usage_event(job.usage()) if job.include_usage else b""
        except _ClientStalled:
            raise
        except RekindleError as error:
            tail = _error_event(error)
        except Exception:  # headers are out: all that is left is to tell the client
            logger.exception("a stream failed after it had begun")
            tail = _error_event(InternalError("the server met an unexpected error"))
        await self._send(send, tail + DONE, last=True)

    async def _first_deltas(self, generation: Generation, send: Send) -> asyncio.Task[list[Delta]]:
        """The first deltas, or what went wrong, once the response has begun. Raises what went wrong before that."""
        first = asyncio.create_task(generation.next_deltas())
        start = {"type": "http.response.start", "status": 200, "headers": EVENT_STREAM_HEADERS}
        has_begun = False
        try:
            while not (await asyncio.wait((first,), timeout=self._runner.settings.comment_every_s))[0]:
                if not has_begun:
                    await send(start)
                    has_begun = True
                await self._send(send, _COMMENT)
        except BaseException:
            first.cancel()
            await asyncio.wait((first,))
            raise
        if not has_begun:
            first.result()
            await send(start)
        return first

    async def _whole(self, deltas: list[Delta], generation: Generation, observer: RequestObserver, send: Send) -> None:
        outcomes = [Outcome(choice.index) for _, choice in self._job.sequences]
        while deltas:
            for delta in deltas:
                outcomes[delta.index].add(delta)
            _note_finished(deltas, observer)
            deltas = await generation.next_deltas()
        for outcome, (_, choice) in zip(outcomes, self._job.sequences, strict=True):
            outcome.prompt_logprobs = choice.prompt_logprobs
        body = self._job.encoder.whole(outcomes, self._job.usage())
        headers = [*JSON_HEADERS, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send(send, body, last=True)

    async def _send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        try:
            async with asyncio.timeout(self._runner.settings.send_timeout_s):
                await send({"type": "http.response.body", "body": body, "more_body": not last})
        except TimeoutError as error:
            raise _ClientStalled from error


async def while_connected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Run `work`, and cancel it as soon as the client is gone. Errors of `work` are raised."""
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        tasks = [task for task in (worker, watcher) if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if not worker.cancelled():
        worker.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _note_finished(deltas: list[Delta], observer: RequestObserver) -> None:
    for delta in deltas:
        if delta.finish_reason is not None:
            observer.finished(delta.finish_reason)


def _error_event(error: RekindleError) -> bytes:
    return b"data: " + body_of(error) + b"\n\n"
