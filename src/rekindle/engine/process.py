"""The engine's process: frames in, steps, frames out.

Three threads. The reader decodes frames into a bounded inbox; the main thread empties the inbox between steps, blocking
only when nothing can run, and steps; the writer sends what steps gave from a bounded outbox, so that a slow peer holds
the loop back instead of filling memory. The process ends when its peer does.
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
from rekindle.protocol.wire import HEADER, Message, StepChunks, WireError, decode, encode, parse_header

INBOX_FRAMES = 4096
OUTBOX_FRAMES = 64
HEARTBEAT_S = 1.0
"""How often statistics are sent at least, also as a sign of life."""


class EngineLike(Protocol):
    """What the loop needs of an engine."""

    @property
    def ready(self) -> EngineReady: ...
    @property
    def has_runnable(self) -> bool: ...
    def add_adapter(self, manifest: AdapterManifest, path: str) -> None: ...
    def remove_adapter(self, digest: AdapterDigest) -> None: ...
    def submit(self, request: GenerateRequest) -> None: ...
    def abort(self, request_id: RequestId) -> None: ...
    def step(self) -> list[TokenChunk]: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


EngineFactory = Callable[[EngineSettings, Clock, Callable[[], None]], EngineLike]


class EngineProcess:
    """The loop around one engine, on one connected stream socket."""

    def __init__(self, connection: socket.socket, make_engine: EngineFactory, clock: Clock) -> None:
        self._connection, self._make_engine, self._clock = connection, make_engine, clock
        self._inbox: queue.Queue[Message | None] = queue.Queue(INBOX_FRAMES)
        self._outbox: queue.Queue[bytes | None] = queue.Queue(OUTBOX_FRAMES)
        self._next_heartbeat_s = 0.0

    def run(self) -> int:
        """Serve until told to stop; returns the process's exit code."""
        writer = threading.Thread(target=self._write_loop, name="wire-writer", daemon=True)
        writer.start()
        threading.Thread(target=self._read_loop, name="wire-reader", daemon=True).start()
        try:
            exit_code = self._serve()
        except RekindleError as error:
            is_configuration = isinstance(error, ConfigurationError | ModelRejected)
            self._send(EngineFatal(str(error), is_configuration))
            exit_code = 1
        self._outbox.put(None)
        writer.join()
        return exit_code

    def _serve(self) -> int:
        settings = self._inbox.get()
        if not isinstance(settings, EngineSettings):
            raise WireError(f"the first frame must be EngineSettings, got {type(settings).__name__}")
        engine = self._make_engine(settings, self._clock, self._wake)
        self._send(engine.ready)
        while self._take_messages(engine):
            chunks = engine.step()
            if chunks:
                self._send(StepChunks(tuple(chunks)))
            self._beat(engine)
        engine.close()
        return 0

    def _take_messages(self, engine: EngineLike) -> bool:
        """Act on all messages at hand; wait for one if the engine has nothing to run. False: shut down."""
        block = not engine.has_runnable
        while True:
            try:
                message = self._inbox.get(block, HEARTBEAT_S)
            except queue.Empty:
                return True
            block = False
            if isinstance(message, Shutdown):
                return False
            if message is not None:
                self._act(engine, message)

    def _act(self, engine: EngineLike, message: Message) -> None:
        match message:
            case GenerateRequest():
                self._submit(engine, message)
            case AbortRequest(request_id):
                engine.abort(request_id)
            case AddAdapter(manifest, path):
                engine.add_adapter(manifest, path)
            case RemoveAdapter(digest):
                engine.remove_adapter(digest)
            case _:
                raise WireError(f"an engine does not take {type(message).__name__}")

    def _submit(self, engine: EngineLike, request: GenerateRequest) -> None:
        try:
            engine.submit(request)
        except (RequestError, RetryLater) as error:
            self._send(StepChunks((_refusal(request, error),)))

    def _beat(self, engine: EngineLike) -> None:
        now_s = self._clock.monotonic_s()
        if now_s >= self._next_heartbeat_s:
            self._next_heartbeat_s = now_s + HEARTBEAT_S
            self._send(engine.stats())

    def _wake(self) -> None:
        self._inbox.put(None)

    def _send(self, message: Message) -> None:
        self._outbox.put(encode(message))

    def _read_loop(self) -> None:
        """Decode frames; when the peer is gone there is nobody to work for."""
        with self._connection.makefile("rb") as stream:
            while len(header := stream.read(HEADER.size)) == HEADER.size:
                length, tag = parse_header(header)
                self._inbox.put(decode(tag, stream.read(length)))
        os._exit(0)

    def _write_loop(self) -> None:
        while (frame := self._outbox.get()) is not None:
            try:
                self._connection.sendall(frame)
            except OSError:
                os._exit(0)


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


def serve(descriptor: int, make_engine: EngineFactory, clock: Clock) -> int:
    """Run an engine on an inherited socket until the peer is gone or says stop; returns the exit code.

    The parent decides what an interrupt means, so SIGINT is ignored here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    with socket.socket(fileno=descriptor) as connection:
        return EngineProcess(connection, make_engine, clock).run()
