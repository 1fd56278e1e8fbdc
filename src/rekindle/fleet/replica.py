"""A replica: one engine process kept alive, and the open requests that survive its death.

When the engine dies without being told to, or gives no sign of life, another one is started; it is told of all
adapters, and open requests go on there from the tokens received so far, under a new epoch. Their readers see a pause.
Requests that come meanwhile wait. An engine that nobody asks anything is stopped until somebody does.

`session` is what passes between a replica and a ready engine, `idleness` when nobody asks. `open_requests` says who is
given up, `supervision` when requests are refused.

One task, made by `start` and ended by `stop`, owns the engine and everything done with it; nothing here polls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path

from rekindle.clock import Clock
from rekindle.errors import (
    AdapterRejected,
    ConfigurationError,
    Conflict,
    DeadlineUnreachable,
    EngineFailed,
    InternalError,
    RekindleError,
    ReplicaUnavailable,
)
from rekindle.fleet.admission import Admission
from rekindle.fleet.idleness import Idleness
from rekindle.fleet.known_adapters import KnownAdapters
from rekindle.fleet.launch import CommandLauncher, Launcher
from rekindle.fleet.link import EngineLink, EngineLost
from rekindle.fleet.open_requests import OpenRequests
from rekindle.fleet.session import EngineSession
from rekindle.fleet.state import ReplicaState, check_transition
from rekindle.fleet.stream import RequestStream
from rekindle.fleet.supervision import RestartPolicy, Supervision
from rekindle.policy.load_estimates import LoadEstimates
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.estimates import START, StageEstimate
from rekindle.protocol.generation import GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.replica import EngineFatal, EngineReady, EngineSettings, EngineStats

_logger = logging.getLogger(__name__)


class Replica:
    """See the module. All methods belong to one event loop.

    `last_start_s` are the timed parts of the latest start, in order; "process" is what the engine's own leave of the
    whole. `launcher` starts engines; `name` stands in the log.
    """

    def __init__(
        self,
        settings: EngineSettings,
        clock: Clock,
        *,
        name: str = "replica",
        supervision: Supervision | None = None,
        launcher: Launcher | None = None,
    ) -> None:
        self._settings, self._clock, self._name = settings, clock, name
        self._launcher = launcher or CommandLauncher()
        self._supervision = supervision or Supervision()
        self._restarts = RestartPolicy(self._supervision)
        self._requests = OpenRequests(self._supervision.max_crashes_per_request)
        self._adapters = KnownAdapters()
        self._admission = Admission(settings, clock)
        self._state = ReplicaState.STARTING
        self._supervisor: asyncio.Task[None] | None = None
        self._started: asyncio.Future[EngineReady] | None = None
        self._idleness = Idleness(clock, self._supervision.keep_alive_s)
        self._session: EngineSession | None = None
        self._was_fruitful = False
        self.last_start_s: tuple[tuple[str, float], ...] = ()
        self.restarts_total = 0
        self.wakes_total = 0
        self._starts = LoadEstimates()
        self._load_estimates: tuple[StageEstimate, ...] = ()

    @property
    def state(self) -> ReplicaState:
        return self._state

    @property
    def is_ready(self) -> bool:
        """Whether a request is answered without anything having to be mended first."""
        return self._state in (ReplicaState.READY, ReplicaState.ASLEEP, ReplicaState.WAKING)

    @property
    def start_estimates(self) -> tuple[StageEstimate, ...]:
        """How long the parts of a start are likely to take, by those there have been."""
        return self._starts.snapshot()

    @property
    def ready(self) -> EngineReady | None:
        """What the present engine said when it was ready, if there is one."""
        return None if self._session is None else self._session.ready

    @property
    def stats(self) -> EngineStats | None:
        """What the present engine last said, if there is one."""
        return None if self._session is None else self._session.stats

    @property
    def engine_pid(self) -> int | None:
        """The present engine's process id, if there is one."""
        return None if self._session is None else self._session.pid

    async def start(self) -> EngineReady:
        """Start the engine and wait until it takes requests. To be called once; if it fails, the replica is stopped.

        Raises:
            ConfigurationError: the engine cannot run with these settings on this machine.
            EngineFailed: it died, or was not ready in time.
        """
        if self._supervisor is not None or self._state is not ReplicaState.STARTING:
            raise InternalError(f"a replica is started once; {self._name} is {self._state.value}")
        self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name=f"{self._name}-supervisor")
        try:
            return await self._started
        except BaseException:
            await self.stop()
            raise

    async def add_adapter(self, manifest: AdapterManifest, path: Path) -> None:
        """Make a version known to this engine and those after it; repeating it is harmless. Returns without waiting:
        whatever is submitted from now on finds the version.

        Raises:
            AdapterRejected: it belongs to another base model.
        """
        base = self._settings.model.digest
        if manifest.base != base:
            raise AdapterRejected(
                f"adapter {manifest.digest} was made for base {manifest.base}, but this replica serves {base}; "
                "register it with its own base",
                field="base_model",
            )
        self._adapters.add(manifest, str(path))
        self._note_news()

    async def remove_adapter(self, digest: AdapterDigest) -> None:
        """Refuse a version to new requests and forget it when the last that uses it ends; unknown ones are ignored."""
        self._adapters.remove(digest)
        self._note_news()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one sequence, without gap or repetition, the last with a finish reason other than ERROR. Tokens
        that have not been asked for yet come as one chunk. Closing the generator aborts the sequence.

        Raises:
            Overloaded: as many requests are open as may run and wait.
            ReplicaUnavailable: the replica is not started, or is stopping, or its engines keep dying.
            DeadlineUnreachable: the first token cannot come in time, as when an engine has to be started first.
            RequestError: the request cannot be carried out, or its adapter is unknown.
            EngineFailed: the engine gave it up, or died of it too often.
        """
        stream = self._open(request)
        try:
            with self._kept_to_its_deadline(stream):
                chunk = await stream.take()
            yield chunk
            while chunk.finish_reason is None:
                chunk = await stream.take()
                yield chunk
        finally:
            self._close(stream)

    async def stop(self) -> None:
        """End the engine; requests still open fail. Leaves no process, task or descriptor behind. Safe to repeat."""
        if self._state is not ReplicaState.STOPPED:
            self._move_to(ReplicaState.STOPPED)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])

    def _open(self, request: GenerateRequest) -> RequestStream:
        self._check_takes_requests()
        self._admission.check(len(self._requests))
        if self._requests.get(request.request_id) is not None:
            raise Conflict(f"request {request.request_id} is open already; give each request an id of its own")
        if request.adapter is not None:
            self._adapters.acquire(request.adapter)
        stream = RequestStream(request, self._clock.monotonic_s())
        self._requests.add(stream)
        self._idleness.end()
        self._note_news()
        return stream

    @contextlib.contextmanager
    def _kept_to_its_deadline(self, stream: RequestStream) -> Iterator[None]:
        """Refuse a request that becomes overdue before an engine has it; from then on the engine sees to that."""
        limit_s = stream.request.ttft_slo_s
        timer = None
        if limit_s is not None:
            timer = asyncio.get_running_loop().call_later(limit_s, self._refuse_overdue, stream, limit_s)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def _refuse_overdue(self, stream: RequestStream, limit_s: float) -> None:
        if not stream.is_submitted:
            stream.fail(
                DeadlineUnreachable(
                    f"no engine could take the request within the {limit_s:g} s that ttft_slo_ms allows for the first "
                    f"token, as the replica is {self._state.value}; try again later, or allow more",
                    retry_after_s=1.0,
                )
            )

    def _check_takes_requests(self) -> None:
        match self._state:
            case ReplicaState.STARTING if self._supervisor is None:
                raise ReplicaUnavailable("the replica has not been started", retry_after_s=1.0)
            case ReplicaState.RESTARTING if self._restarts.is_hopeless:
                raise ReplicaUnavailable(
                    "the engine died several times in a row and is being restarted",
                    retry_after_s=self._restarts.retry_after_s(self._clock.monotonic_s()),
                )
            case ReplicaState.STOPPED:
                raise ReplicaUnavailable("the server is shutting down", retry_after_s=1.0)

    def _close(self, stream: RequestStream) -> None:
        if self._requests.remove(stream) and self._session is not None:
            self._session.abort(stream.request_id)
        adapter = stream.request.adapter
        if adapter is not None:
            self._adapters.release(adapter)
        self._admission.note_departure(len(self._requests))
        if not len(self._requests):
            self._idleness.begin()
        self._note_news()

    def _note_news(self) -> None:
        if self._session is not None:
            self._session.note_news()

    def _move_to(self, state: ReplicaState) -> None:
        check_transition(self._state, state)
        _logger.info("%s: %s -> %s", self._name, self._state.value, state.value)
        self._state = state

    async def _supervise(self) -> None:
        """Keep an engine running while somebody asks, until cancelled; no request outlives this."""
        try:
            while True:
                lost = await self._run_engine_to_its_end()
                if self._state is ReplicaState.STOPPED:
                    return  # a task group that ends with errors keeps a cancellation that came meanwhile to itself
                if lost is None or self._state is ReplicaState.ASLEEP:
                    await self._sleep()
                elif self._started is not None and not self._started.done():
                    self._started.set_exception(_error_at_start(lost))
                    return
                else:
                    await asyncio.sleep(self._prepare_restart(lost))
                    self.restarts_total += 1
        finally:
            self._fail_all("the server is shutting down", retry_after_s=1.0)
            if self._started is not None and not self._started.done():
                self._started.set_exception(EngineFailed("the replica was stopped before its engine was ready"))

    async def _run_engine_to_its_end(self) -> EngineLost | None:
        """Returns how the engine was lost, or None if it is not needed for now.

        A fault in this process must not end the replica: it is logged, and the engine is replaced.
        """
        try:
            await self._run_engine()
        except EngineLost as lost:
            return lost
        except Exception as error:
            _logger.exception("%s: unexpected error in supervision", self._name)
            return EngineLost(f"{type(error).__name__}: {error}")
        return None

    async def _run_engine(self) -> None:
        """Run one engine until it is not needed for now.

        Raises:
            EngineLost: it has died, or had to be killed.
        """
        self._was_fruitful = False
        started_s = self._clock.monotonic_s()
        link = await EngineLink.spawn(self._launcher)
        session = None
        try:
            ready = await self._start_engine(link)
            session = self._session = EngineSession(
                link, ready, self._requests, self._adapters, self._idleness, self._clock, self._supervision.silence_s
            )
            self._note_ready(ready, started_s)
            await session.run()
            self._move_to(ReplicaState.ASLEEP)
        finally:
            self._session = None
            if session is not None and session.stats is not None:
                self._load_estimates = session.stats.load_estimates
            self._was_fruitful = session is not None and session.is_fruitful
            is_dismissed = session is not None and self._state in (ReplicaState.STOPPED, ReplicaState.ASLEEP)
            await link.close(self._supervision.stop_s if is_dismissed else 0.0)

    async def _start_engine(self, link: EngineLink) -> EngineReady:
        limit_s = self._supervision.start_s
        try:
            async with asyncio.timeout(limit_s):
                await link.send(replace(self._settings, load_estimates=self._load_estimates))
                message = await link.receive()
        except TimeoutError:
            raise EngineLost(f"engine process {link.pid} was not ready within {limit_s:g} s") from None
        match message:
            case EngineReady():
                return message
            case EngineFatal(reason, is_configuration):
                raise EngineLost(reason, is_configuration=is_configuration)
            case _:
                raise EngineLost(f"the engine began with {type(message).__name__} instead of EngineReady")

    def _note_ready(self, ready: EngineReady, started_s: float) -> None:
        process_s = self._clock.monotonic_s() - started_s - sum(duration_s for _, duration_s in ready.parts_s)
        self.last_start_s = (("process", process_s), *ready.parts_s)
        for part, duration_s in self.last_start_s:
            self._starts.observe(START + part, self._settings.model.num_bytes if part == "weights" else 0, duration_s)
        parts = ", ".join(f"{part} {duration_s:.2f} s" for part, duration_s in self.last_start_s)
        _logger.info("%s: engine ready (%s)", self._name, parts)
        if self._state is not ReplicaState.STOPPED:
            self._move_to(ReplicaState.READY)
        if self._started is not None and not self._started.done():
            self._started.set_result(ready)

    async def _sleep(self) -> None:
        """Return when there is a request."""
        self._requests.take_back()
        self._adapters.engine_lost()
        await self._idleness.until_over()
        self._move_to(ReplicaState.WAKING)
        self.wakes_total += 1

    def _prepare_restart(self, lost: EngineLost) -> float:
        """Sort out what the lost engine leaves behind; returns the seconds to wait before the next one is started."""
        now_s = self._clock.monotonic_s()
        delay_s = self._restarts.crashed(now_s, was_fruitful=self._was_fruitful)
        self._adapters.engine_lost()
        for stream in self._requests.engine_lost():
            stream.fail(
                EngineFailed(
                    f"the engine died {stream.num_crashes} times while it computed this request, which is not tried "
                    f"again; the last time: {lost}"
                )
            )
        if self._state in (ReplicaState.READY, ReplicaState.WAKING):
            self._move_to(ReplicaState.RESTARTING)
        if self._restarts.is_hopeless:
            self._fail_all("the engine died several times in a row", retry_after_s=self._restarts.retry_after_s(now_s))
        _logger.error(
            "%s: %s; %d requests are open; another engine is started in %.2g s",
            self._name, lost, len(self._requests), delay_s,
        )  # fmt: skip
        return delay_s

    def _fail_all(self, message: str, retry_after_s: float) -> None:
        for stream in self._requests:
            stream.fail(ReplicaUnavailable(message, retry_after_s=retry_after_s))


def _error_at_start(lost: EngineLost) -> RekindleError:
    if lost.is_configuration:
        return ConfigurationError(str(lost))
    return EngineFailed(f"the engine could not be started: {lost}")
