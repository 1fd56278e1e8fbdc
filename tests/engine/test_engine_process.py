"""The loop around an engine, in a thread of the test, over a real socket pair."""

import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import pytest

from rekindle.clock import Clock, SystemClock
from rekindle.engine.process import HEARTBEAT_S, OUTBOX_FRAMES, EngineProcess
from rekindle.errors import AdapterRejected, ConfigurationError, Overloaded
from rekindle.protocol.generation import AbortRequest, FinishReason, GenerateRequest, Refusal, TokenChunk
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import (
    AddAdapter,
    EngineFatal,
    EngineReady,
    EngineSettings,
    EngineStats,
    PoolBytes,
    RemoveAdapter,
    Shutdown,
)
from rekindle.protocol.wire import StepChunks, encode, read_message
from support.replicas import ADAPTER, engine_settings, request

LIMIT_S = 20.0
READY = EngineReady(100, 4096, 16, 512, ())


@dataclass
class ScriptedEngine:
    """Does what the test says, and tells what it was asked."""

    wake: Callable[[], None]
    ready: EngineReady = READY
    open: list[RequestId] = field(default_factory=list)
    answers: list[TokenChunk] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    refusal: Exception | None = None
    adapter_refusal: Exception | None = None
    failure: Exception | None = None
    is_flooding: bool = False
    next_deadline_s: float | None = None
    num_steps: int = 0
    is_closed: bool = False

    @property
    def has_runnable(self) -> bool:
        return bool(self.answers) or self.is_flooding

    def add_adapter(self, manifest: Any, path: str) -> None:
        self.seen.append(path)
        if self.adapter_refusal is not None:
            raise self.adapter_refusal

    def remove_adapter(self, digest: AdapterDigest) -> None:
        self.seen.append(digest)

    def submit(self, request: GenerateRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.open.append(request.request_id)

    def abort(self, request_id: RequestId) -> None:
        self.open.remove(request_id)
        self.answers.append(TokenChunk(request_id, 0, 0, (), FinishReason.ABORT))

    def step(self) -> list[TokenChunk]:
        if self.failure is not None and self.open:
            raise self.failure
        chunks, self.answers = self.answers, []
        if self.next_deadline_s is not None and SystemClock().monotonic_s() >= self.next_deadline_s:
            self.next_deadline_s = None
            chunks += [TokenChunk(name, 0, 0, (), FinishReason.ERROR) for name in self.open]
        if self.is_flooding:
            self.num_steps += 1
            chunks.append(TokenChunk(RequestId("flood"), 0, self.num_steps, tuple(range(10_000))))
        return chunks

    def stats(self) -> EngineStats:
        return EngineStats(len(self.open), 0, *[0] * 5, PoolBytes(*[0] * 9), (), *[0] * 13)

    def close(self) -> None:
        self.is_closed = True


class Peer:
    """The other end of the socket, and the engine behind it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.stream: BinaryIO = connection.makefile("rb")
        self.engine: ScriptedEngine | None = None
        self.exit_codes: list[int] = []
        self.left = threading.Event()

    def send(self, *messages: Any) -> None:
        self.connection.sendall(b"".join(map(encode, messages)))

    def receive(self, kind: type) -> Any:
        """The next message of a kind; others are passed over."""
        while not isinstance(message := read_message(self.stream), kind):
            assert message is not None, f"the engine is gone, {kind.__name__} was expected"
        return message

    def chunk(self) -> TokenChunk:
        (only,) = self.receive(StepChunks).chunks
        return only


@contextmanager
def serving(**script: Any) -> Iterator[Peer]:
    """An engine process in a thread, ready, and shut down in the end."""
    ours, theirs = socket.socketpair()
    ours.settimeout(LIMIT_S)
    peer = Peer(ours)

    def make_engine(settings: EngineSettings, clock: Clock, wake: Callable[[], None]) -> ScriptedEngine:
        if "start" in script:
            raise script["start"]
        peer.engine = ScriptedEngine(wake, **script)
        return peer.engine

    def leave(exit_code: int) -> None:
        peer.left.set()
        process._inbox.put(Shutdown())

    process = EngineProcess(theirs, make_engine, SystemClock(), leave)
    thread = threading.Thread(target=lambda: peer.exit_codes.append(process.run()))
    thread.start()
    try:
        yield peer
        if not peer.left.is_set() and thread.is_alive():
            peer.send(Shutdown())
    finally:
        thread.join(LIMIT_S)
        peer.stream.close()
        ours.close()
        for reader in threading.enumerate():
            if reader.name == "wire-reader":
                reader.join(LIMIT_S)
        theirs.close()
    assert not thread.is_alive()


@contextmanager
def ready(**script: Any) -> Iterator[tuple[Peer, ScriptedEngine]]:
    with serving(**script) as peer:
        peer.send(engine_settings())
        assert peer.receive(EngineReady) == replace(READY, parts_s=(("imports", 0.0),))
        assert peer.engine is not None
        yield peer, peer.engine


def test_messages_reach_the_engine_in_order_and_a_shutdown_ends_it() -> None:
    with ready() as (peer, engine):
        peer.send(
            AddAdapter(ADAPTER, "/file"), RemoveAdapter(ADAPTER.digest), request("r"), AbortRequest(RequestId("r"))
        )
        assert peer.chunk().finish_reason is FinishReason.ABORT
        assert engine.seen == ["/file", ADAPTER.digest]
    assert peer.exit_codes == [0]
    assert engine.is_closed


def test_a_change_on_another_thread_wakes_an_idle_loop() -> None:
    with ready() as (peer, engine):
        peer.receive(EngineStats)
        engine.answers.append(TokenChunk(RequestId("r"), 0, 0, (7,)))
        engine.wake()
        assert peer.chunk().token_ids == (7,)


def test_a_refused_request_is_answered_with_the_reason() -> None:
    with ready(refusal=Overloaded("the queue is full", retry_after_s=2.5)) as (peer, _):
        peer.send(request("r"))
        chunk = peer.chunk()
    assert (chunk.finish_reason, chunk.error) == (FinishReason.ERROR, "the queue is full")
    assert chunk.refusal == Refusal("Overloaded", retry_after_s=2.5)


def test_a_refused_adapter_is_refused_to_those_who_ask_for_it_and_to_nobody_else() -> None:
    with ready(adapter_refusal=AdapterRejected("of another base", field="base_model")) as (peer, engine):
        peer.send(AddAdapter(ADAPTER, "/file"), request("a", adapter=ADAPTER.digest), request("b"))
        chunk = peer.chunk()
        assert chunk.refusal == Refusal("AdapterRejected", field="base_model")
        peer.send(AbortRequest(RequestId("b")))
        assert peer.chunk().request_id == "b"
        engine.adapter_refusal = None
        peer.send(AddAdapter(ADAPTER, "/file"), request("c", adapter=ADAPTER.digest), AbortRequest(RequestId("c")))
        assert peer.chunk().finish_reason is FinishReason.ABORT


def test_an_engine_with_open_sequences_and_nothing_to_run_gives_signs_of_life() -> None:
    with ready() as (peer, _):
        peer.send(request("r"))
        for _ in range(2):
            while peer.receive(EngineStats).num_waiting != 1:
                continue


def test_an_idle_loop_lets_the_engine_look_again_when_a_deadline_has_come() -> None:
    with ready() as (peer, engine):
        engine.next_deadline_s = SystemClock().monotonic_s() + 0.05
        peer.send(request("r"))
        assert peer.chunk().request_id == "r"
        assert engine.next_deadline_s is None


def test_an_engine_without_work_says_nothing() -> None:
    with ready() as (peer, _):
        peer.receive(EngineStats)
        assert select.select([peer.connection], [], [], 2 * HEARTBEAT_S) == ([], [], [])


def test_a_peer_that_does_not_read_holds_the_engine_back() -> None:
    with ready(is_flooding=True) as (peer, engine):
        halted = threading.Event()
        num_steps = -1
        while num_steps != engine.num_steps:
            num_steps = engine.num_steps
            halted.wait(0.3)
        assert 0 < num_steps < OUTBOX_FRAMES + 50
        engine.is_flooding = False
        offsets = [peer.chunk().offset for _ in range(num_steps)]
        assert offsets == list(range(1, num_steps + 1))


@pytest.mark.parametrize(
    ("failure", "message"),
    [(RuntimeError("[enforce fail]"), "RuntimeError: [enforce fail]"), (ConfigurationError("too small"), "too small")],
)
def test_a_failing_engine_says_why_before_it_ends(failure: Exception, message: str) -> None:
    with ready(failure=failure) as (peer, engine):
        peer.send(request("r"))
        fatal = peer.receive(EngineFatal)
        assert fatal == EngineFatal(message, isinstance(failure, ConfigurationError))
    assert peer.exit_codes == [1]
    assert engine.is_closed


def test_an_engine_that_cannot_start_says_why() -> None:
    with serving(start=ConfigurationError("dtype 'int3' is not supported")) as peer:
        peer.send(engine_settings())
        assert peer.receive(EngineFatal) == EngineFatal("dtype 'int3' is not supported", is_configuration=True)


def test_a_first_frame_other_than_the_settings_is_fatal() -> None:
    with serving() as peer:
        peer.send(Shutdown())
        assert "must be EngineSettings, got Shutdown" in peer.receive(EngineFatal).message


@pytest.mark.parametrize("frame", [b"\xff" * 5, encode(READY)])
def test_a_frame_that_makes_no_sense_is_fatal(frame: bytes) -> None:
    with ready() as (peer, _):
        peer.connection.sendall(frame)
        assert peer.receive(EngineFatal).message


@pytest.mark.parametrize("last_words", [b"", encode(Shutdown())[:3]])
def test_the_process_ends_when_its_peer_is_gone_even_within_a_frame(last_words: bytes) -> None:
    with ready() as (peer, _):
        peer.connection.sendall(last_words)
        peer.connection.shutdown(socket.SHUT_WR)
        assert peer.left.wait(LIMIT_S)


def test_an_engine_process_imports_neither_the_web_framework_nor_transformers() -> None:
    script = (
        "import sys, rekindle.engine.process; assert 'torch' not in sys.modules; import rekindle.engine.engine\n"
        "heavy = {'fastapi', 'starlette', 'pydantic', 'uvicorn', 'sqlalchemy', 'transformers', 'peft'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
