"""The engine's process: frames in, steps, frames out.

Three threads. The reader decodes frames into a bounded inbox; the main thread empties the inbox between steps, blocking
only when nothing can run, and steps; the writer sends what steps gave from a bounded outbox, so that a slow peer holds
the loop back instead of filling memory. The process ends when its peer does, whatever the main thread is doing.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from rekindle.clock import Clock
from rekindle.errors import ConfigurationError, ModelRejected, RekindleError, RequestError, RetryLater
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import AbortRequest, FinishReason, GenerateRequest, Refusal, TokenChunk
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
from rekindle.protocol.wire import Message, StepChunks, TornFrame, WireError, encode, read_message
from rekindle.store.tier_client import TierClient

INBOX_FRAMES = 4096
OUTBOX_FRAMES = 64
HEARTBEAT_S = 1.0
"""How often statistics are sent while sequences are open or anything changes; they are the sign of life, too."""

_logger = logging.getLogger(__name__)


class EngineLike(Protocol):
    """What the loop needs of an engine. Every method is called from one thread.

    `submit` raises RequestError or RetryLater for what it does not take. `step` computes one step if something can run
    and returns what sequences gained since the last call. `has_runnable` is False from a step without effect on until
    something changes; what changes outside of a call, such as a finished adapter load, is told through the `wake` that
    the engine was made with, from any thread. At `next_deadline_s`, by the clock the engine was made with, time alone
    gives `step` something to say.
    """

    @property
    def ready(self) -> EngineReady: ...
    @property
    def has_runnable(self) -> bool: ...
    @property
    def next_deadline_s(self) -> float | None: ...
    def add_adapter(self, manifest: AdapterManifest, path: str) -> None: ...
    def remove_adapter(self, digest: AdapterDigest) -> None: ...
    def submit(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: RequestId) -> None: ...
    def step(self) -> list[TokenChunk]: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


EngineFactory = Callable[[EngineSettings, Clock, Callable[[], None]], EngineLike]


class EngineProcess:
    """The loop around one engine, on one connected stream socket. `leave` ends the process at once; `imports_s` is how
    long this process took to import what the engine needs."""

    def __init__(
        self,
        connection: socket.socket,
        make_engine: EngineFactory,
        clock: Clock,
        leave: Callable[[int], object] = os._exit,
        imports_s: float = 0.0,
    ) -> None:
        self._connection, self._make_engine, self._clock, self._leave = connection, make_engine, clock, leave
        self._imports_s = imports_s
        self._inbox: queue.Queue[Message | WireError | None] = queue.Queue(INBOX_FRAMES)
        self._outbox: queue.Queue[bytes | None] = queue.Queue(OUTBOX_FRAMES)
        self._refused_adapters: dict[AdapterDigest, RequestError] = {}
        self._next_report_s = 0.0
        self._reported: EngineStats | None = None
        self._is_settled = False

    def run(self) -> int:
        """Serve until told to stop; returns the process's exit code.

        Whatever goes wrong is reported to the peer as `EngineFatal` before the process ends, hence the broad handler.
        """
        writer = threading.Thread(target=self._write_loop, name="wire-writer", daemon=True)
        writer.start()
        threading.Thread(target=self._read_loop, name="wire-reader", daemon=True).start()
        try:
            self._serve()
            exit_code = 0
        except (ConfigurationError, ModelRejected) as error:
            self._send(EngineFatal(str(error), is_configuration=True))
            exit_code = 1
        except Exception as error:
            _logger.critical("the engine failed", exc_info=True)
            message = str(error) if isinstance(error, RekindleError) else f"{type(error).__name__}: {error}"
            self._send(EngineFatal(message, is_configuration=False))
            exit_code = 1
        self._outbox.put(None)
        writer.join()
        return exit_code

    def _serve(self) -> None:
        settings = self._inbox.get()
        if not isinstance(settings, EngineSettings):
            raise WireError(f"the first frame must be EngineSettings, got {type(settings).__name__}")
        engine = self._make_engine(settings, self._clock, self._wake)
        try:
            self._send(replace(engine.ready, parts_s=(("imports", self._imports_s), *engine.ready.parts_s)))
            while self._take_messages(engine):
                chunks = engine.step()
                if chunks:
                    self._is_settled = False
                    self._send(StepChunks(tuple(chunks)))
                self._report(engine)
        finally:
            engine.close()

    def _take_messages(self, engine: EngineLike) -> bool:
        """Act on all messages at hand; wait for one if the engine has nothing to run, until it is time for a sign of
        life or for the engine to look again. False: shut down."""
        block = not engine.has_runnable
        timeout_s = None if self._is_settled else HEARTBEAT_S
        if block and (deadline_s := engine.next_deadline_s) is not None:
            timeout_s = min(HEARTBEAT_S, max(deadline_s - self._clock.monotonic_s(), 0.0))
        while True:
            try:
                message = self._inbox.get(block, timeout_s)
            except queue.Empty:
                return True
            block = self._is_settled = False
            match message:
                case None:
                    continue
                case WireError():
                    raise message
                case Shutdown():
                    return False
                case _:
                    self._act(engine, message)

    def _act(self, engine: EngineLike, message: Message) -> None:
        match message:
            case GenerateRequest():
                self._submit(engine, message)
            case AbortRequest(request_id):
                engine.abort(request_id)
            case AddAdapter():
                self._add_adapter(engine, message)
            case RemoveAdapter(digest):
                self._refused_adapters.pop(digest, None)
                engine.remove_adapter(digest)
            case _:
                raise WireError(f"an engine does not take {type(message).__name__}")

    def _add_adapter(self, engine: EngineLike, message: AddAdapter) -> None:
        """A version that the engine refuses is refused again to each request for it; it harms nobody else."""
        digest = message.manifest.digest
        try:
            engine.add_adapter(message.manifest, message.path)
            self._refused_adapters.pop(digest, None)
        except RequestError as error:
            _logger.error("adapter %s is refused: %s", digest, error)
            self._refused_adapters[digest] = error

    def _submit(self, engine: EngineLike, request: GenerateRequest) -> None:
        try:
            if request.adapter in self._refused_adapters:
                raise self._refused_adapters[request.adapter]
            engine.submit(request)
        except (RequestError, RetryLater) as error:
            self._send(StepChunks((_refusal(request, error),)))

    def _report(self, engine: EngineLike) -> None:
        """Send statistics if they are due, and note whether there is nothing more to report until a message comes."""
        now_s = self._clock.monotonic_s()
        if now_s < self._next_report_s:
            return
        stats = engine.stats()
        is_idle = not (stats.num_waiting or stats.num_running)
        self._is_settled = is_idle and stats == self._reported
        if not self._is_settled:
            self._next_report_s = now_s + HEARTBEAT_S
            self._reported = stats
            self._send(stats)

    def _wake(self) -> None:
        """Make an idle loop look again; a full inbox means that it is not idle."""
        try:
            self._inbox.put_nowait(None)
        except queue.Full:
            return

    def _send(self, message: Message) -> None:
        self._outbox.put(encode(message))

    def _read_loop(self) -> None:
        """Decode frames until the peer is gone; then there is nobody to work for."""
        try:
            with self._connection.makefile("rb") as stream:
                while (message := read_message(stream)) is not None:
                    self._inbox.put(message)
        except (OSError, TornFrame):
            self._leave(0)
        except WireError as error:
            self._inbox.put(error)
        else:
            self._leave(0)

    def _write_loop(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._connection.sendall(frame)
            except OSError:
                self._leave(0)


def _refusal(request: GenerateRequest, error: RequestError | RetryLater) -> TokenChunk:
    if isinstance(error, RetryLater):
        refusal = Refusal(type(error).__name__, retry_after_s=error.retry_after_s)
    else:
        refusal = Refusal(type(error).__name__, field=error.field, code=error.code)
    return TokenChunk(
        request_id=request.request_id,
        epoch=request.epoch,
        offset=len(request.generated_token_ids),
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=str(error),
        refusal=refusal,
    )


def with_tier(make_engine: Callable[..., EngineLike], descriptor: int | None) -> EngineFactory:
    """A factory of engines that share memory through the host-memory tier at this socket, if any."""
    if descriptor is None:
        return make_engine
    return partial(make_engine, tier=TierClient(socket.socket(fileno=descriptor)))


def serve(descriptor: int, make_engine: EngineFactory, clock: Clock, imports_s: float = 0.0) -> int:
    """Run an engine on an inherited socket until the peer is gone or says stop; returns the exit code. `imports_s` is
    told with the parts of the engine's start.

    The parent decides what an interrupt means, so SIGINT is ignored here; SIGTERM ends the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=descriptor) as connection:
        return EngineProcess(connection, make_engine, clock, imports_s=imports_s).run()
