"""A replica: one engine process kept alive, and the open requests that survive its death.

When the process ends without being told to, another is started and open requests are submitted to it again, with the
tokens received so far, under a new epoch; their readers see a pause. To find out which request kills an engine, those
that were present at a crash are submitted again one at a time, each after the one before has made progress; a request
present at two crashes without a token in between is failed. An engine that gives no sign of life is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from rekindle import errors
from rekindle.clock import Clock
from rekindle.errors import (
    ConfigurationError,
    Conflict,
    EngineFailed,
    Overloaded,
    RekindleError,
    ReplicaUnavailable,
    RequestError,
    RetryLater,
    StreamBroken,
)
from rekindle.fleet.link import EXIT_DEADLINE_S, EngineLink
from rekindle.fleet.stream import RequestStream
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import AbortRequest, GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import (
    AddAdapter,
    EngineFatal,
    EngineReady,
    EngineSettings,
    EngineStats,
    RemoveAdapter,
    Shutdown,
)
from rekindle.protocol.wire import StepChunks, WireError

_logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "rekindle.engine")


class ReplicaState(Enum):
    """STARTING -> READY -> RESTARTING -> READY ...; any -> DRAINING -> STOPPED."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Supervision:
    """How patient a replica is with its engine.

    `start_s` is how long a start may take. An engine with open requests that sends nothing for `silence_s` is taken
    for hung. Restarts wait `backoff_s`, doubling up to `max_backoff_s` while none gets as far as a token; after
    `max_failed_starts` of these in a row new requests are refused until one does.
    """

    start_s: float = 300.0
    silence_s: float = 120.0
    backoff_s: float = 0.25
    max_backoff_s: float = 15.0
    max_failed_starts: int = 4


class Replica:
    """See the module. All methods belong to one event loop."""

    def __init__(
        self,
        settings: EngineSettings,
        clock: Clock,
        *,
        supervision: Supervision | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._settings, self._clock, self._command = settings, clock, tuple(command)
        self._supervision = supervision or Supervision()
        self._adapters: dict[AdapterDigest, AddAdapter] = {}
        self._streams: dict[RequestId, RequestStream] = {}
        self._suspects: list[RequestStream] = []
        self._spawned: EngineLink | None = None
        self._link: EngineLink | None = None
        """The same once its engine takes requests."""
        self._stopping = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._first_start: asyncio.Future[EngineReady] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_frame_s = 0.0
        self._num_failed_starts = 0
        self.state = ReplicaState.STARTING
        self.ready: EngineReady | None = None
        self.stats: EngineStats | None = None
        self.restarts_total = 0

    @property
    def is_ready(self) -> bool:
        return self.state is ReplicaState.READY

    async def start(self) -> EngineReady:
        """Start the engine and wait until it takes requests.

        Raises:
            ConfigurationError: the engine says it can never start this way.
            ReplicaUnavailable: it did not start in time, or died starting.
        """
        self._first_start = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="replica-supervisor")
        try:
            return await self._first_start
        except BaseException:
            await self.stop()
            raise

    async def add_adapter(self, manifest: AdapterManifest, path: Path) -> None:
        """Make a version known to this engine and its successors; repeating it is harmless."""
        message = AddAdapter(manifest, str(path))
        self._adapters[manifest.digest] = message
        if self._link is not None and self.ready is not None:
            self._link.send(message)
            await self._link.flush()

    async def remove_adapter(self, digest: AdapterDigest) -> None:
        """Forget a version once no open request uses it; unknown ones are ignored."""
        if self._adapters.pop(digest, None) is not None and self._link is not None:
            self._link.send(RemoveAdapter(digest))
            await self._link.flush()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one sequence without gap or repetition; closing the generator aborts it.

        Raises:
            Overloaded: as many requests are open as may run and wait.
            ReplicaUnavailable: the replica is draining, or its engine keeps failing.
            RequestError: the engine refused the request.
            EngineFailed: the engine gave it up, or died twice of it.
        """
        stream = self._open(request)
        is_finished = False
        try:
            while not is_finished:
                chunk = await stream.take()
                is_finished = chunk.finish_reason is not None
                if chunk.error is not None:
                    raise _error_of(chunk)
                yield chunk
        finally:
            self._close(stream, is_finished)

    async def drain(self, deadline_s: float) -> None:
        """Take no new requests and wait up to `deadline_s` seconds for the open ones."""
        self.state = ReplicaState.DRAINING
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), deadline_s)

    async def stop(self) -> None:
        """End the engine; open requests fail. Leaves no process, task or descriptor behind."""
        self.state = ReplicaState.STOPPED
        self._stopping.set()
        if self._link is not None:
            self._link.send(Shutdown())
            asyncio.get_running_loop().call_later(EXIT_DEADLINE_S, self._link.kill)
        elif self._spawned is not None:
            self._spawned.kill()
        if self._supervisor is not None:
            await self._supervisor
        for stream in self._streams.values():
            stream.fail(ReplicaUnavailable("the server is shutting down", retry_after_s=1.0))

    def _open(self, request: GenerateRequest) -> RequestStream:
        if self.state in (ReplicaState.DRAINING, ReplicaState.STOPPED):
            raise ReplicaUnavailable("the replica is shutting down", retry_after_s=1.0)
        if self._num_failed_starts >= self._supervision.max_failed_starts:
            raise ReplicaUnavailable(
                f"the engine failed {self._num_failed_starts} times in a row and is being restarted",
                retry_after_s=self._supervision.max_backoff_s,
            )
        limit = self._settings.max_queued + self._settings.max_sequences
        if len(self._streams) >= limit:
            raise Overloaded(f"{len(self._streams)} requests are open, at most {limit} may be", retry_after_s=1.0)
        if request.request_id in self._streams:
            raise Conflict(f"request id {request.request_id!r} is in use")
        stream = RequestStream(request)
        self._streams[request.request_id] = stream
        self._idle.clear()
        self._submit(stream)
        return stream

    def _close(self, stream: RequestStream, is_finished: bool) -> None:
        request_id = stream.request.request_id
        del self._streams[request_id]
        if stream in self._suspects:
            self._suspects.remove(stream)
        if stream.is_submitted and not is_finished and self._link is not None:
            self._link.send(AbortRequest(request_id))
        if not self._streams:
            self._idle.set()
        self._submit_next_suspect()

    def _submit(self, stream: RequestStream) -> None:
        """Give a request to the engine, if there is one; otherwise it goes out when there is."""
        if self._link is not None and self.ready is not None:
            stream.is_submitted = True
            self._link.send(stream.request)
            if len(self._streams) == 1:
                self._last_frame_s = self._clock.monotonic_s()

    async def _supervise(self) -> None:
        """Keep an engine running until the replica is stopped."""
        backoff_s = self._supervision.backoff_s
        while True:
            reason = await self._run_engine()
            if self.state is ReplicaState.STOPPED:
                return
            self.restarts_total += 1
            self._num_failed_starts += 1
            self.state = ReplicaState.RESTARTING if self.state is ReplicaState.READY else self.state
            _logger.error("the engine ended: %s; restarting it with %d open requests", reason, len(self._streams))
            self._sort_out_crashed(reason)
            backoff_s = backoff_s if self._num_failed_starts > 1 else self._supervision.backoff_s
            if self._num_failed_starts > 1:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), backoff_s)
                backoff_s = min(2 * backoff_s, self._supervision.max_backoff_s)

    async def _run_engine(self) -> str:
        """Run one engine process to its end; returns why it ended."""
        try:
            link = await EngineLink.spawn(self._command)
        except OSError as error:
            return f"it could not be started: {error}"
        self._spawned = link
        watchdog: asyncio.Task[None] | None = None
        try:
            if self.state is ReplicaState.STOPPED:
                link.kill()
            reason = await self._await_ready(link)
            if reason is None:
                watchdog = asyncio.create_task(self._watch(link), name="replica-watchdog")
                reason = await self._pump(link)
        except WireError as error:
            reason = str(error)
        finally:
            self._link, self._spawned, self.ready = None, None, None
            if watchdog is not None:
                watchdog.cancel()
            link.kill()
            exit_code = await link.close()
        return f"{reason} (exit code {exit_code})"

    async def _await_ready(self, link: EngineLink) -> str | None:
        """Bring a fresh engine to where it takes requests; returns what went wrong, if anything."""
        link.send(self._settings)
        try:
            message = await asyncio.wait_for(link.receive(), self._supervision.start_s)
        except TimeoutError:
            message = None
        if isinstance(message, EngineFatal):
            failure = ConfigurationError if message.is_configuration else ReplicaUnavailable
            self._fail_first_start(message.message, is_configuration=failure is ConfigurationError)
            return message.message
        if not isinstance(message, EngineReady):
            self._fail_first_start("the engine did not start", is_configuration=False)
            return "it did not start"
        for adapter in self._adapters.values():
            link.send(adapter)
        self._link, self.ready = link, message
        self._last_frame_s = self._clock.monotonic_s()
        if self.state in (ReplicaState.STARTING, ReplicaState.RESTARTING):
            self.state = ReplicaState.READY
        self._resubmit()
        if self._first_start is not None and not self._first_start.done():
            self._first_start.set_result(message)
        return None

    def _fail_first_start(self, message: str, *, is_configuration: bool) -> None:
        if self._first_start is None or self._first_start.done():
            return
        error = ConfigurationError(message) if is_configuration else ReplicaUnavailable(message, retry_after_s=5.0)
        self._first_start.set_exception(error)

    async def _pump(self, link: EngineLink) -> str:
        """Hand out what the engine sends until it ends; returns why."""
        while (message := await link.receive()) is not None:
            self._last_frame_s = self._clock.monotonic_s()
            match message:
                case StepChunks(chunks):
                    for chunk in chunks:
                        self._hand_out(chunk)
                case EngineStats():
                    self.stats = message
                case EngineFatal():
                    return message.message
                case _:
                    return f"it sent an unexpected {type(message).__name__}"
        return "its process died"

    def _hand_out(self, chunk: TokenChunk) -> None:
        stream = self._streams.get(chunk.request_id)
        if stream is None:
            return
        try:
            stream.push(chunk)
        except StreamBroken as error:
            stream.fail(error)
        if chunk.token_ids:
            self._num_failed_starts = 0
        if stream in self._suspects:
            self._suspects.remove(stream)
            self._submit_next_suspect()

    def _sort_out_crashed(self, reason: str) -> None:
        """Count the crash against every request the engine had, and prepare them for the next engine."""
        for stream in self._streams.values():
            if stream.is_submitted:
                stream.num_crashes += 1
                stream.is_submitted = False
                if stream.num_crashes >= 2:
                    stream.fail(
                        EngineFailed(f"the engine ended twice while it computed this request; the last time: {reason}")
                    )
            stream.epoch += 1

    def _resubmit(self) -> None:
        """Submit what is open: requests that met no crash at once, the others one by one."""
        waiting = list(self._streams.values())
        self._suspects = [stream for stream in waiting if stream.num_crashes == 1]
        for stream in waiting:
            if stream.num_crashes == 0:
                self._submit(stream)
        self._submit_next_suspect()

    def _submit_next_suspect(self) -> None:
        if self._suspects and not self._suspects[0].is_submitted:
            self._submit(self._suspects[0])

    async def _watch(self, link: EngineLink) -> None:
        """Kill an engine that has open requests and is silent."""
        silence_s = self._supervision.silence_s
        while True:
            await asyncio.sleep(silence_s / 4)
            if self._streams and self._clock.monotonic_s() - self._last_frame_s > silence_s:
                _logger.error("the engine has sent nothing for %.0f s; killing it", silence_s)
                link.kill()


def _error_of(chunk: TokenChunk) -> RekindleError:
    """The error an engine reported for one request."""
    message, refusal = chunk.error or "", chunk.refusal
    kind = getattr(errors, refusal.kind, None) if refusal is not None else None
    if refusal is None or not isinstance(kind, type):
        return EngineFailed(message)
    if issubclass(kind, RetryLater):
        return kind(message, retry_after_s=refusal.retry_after_s or 1.0)
    if issubclass(kind, RequestError):
        return kind(message, field=refusal.field, code=refusal.code)
    return EngineFailed(message)
