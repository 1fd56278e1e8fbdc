"""Replicas that stop an engine nobody asks and start one for the next request."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from rekindle.clock import ManualClock, SystemClock
from rekindle.errors import DeadlineUnreachable, ReplicaUnavailable
from rekindle.fleet.control import ChildProcess
from rekindle.fleet.launch import CommandLauncher, TemplateLauncher
from rekindle.fleet.link import EngineLink, EngineLost
from rekindle.fleet.replica import Replica
from rekindle.fleet.state import ReplicaState
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.wire import Message
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.testing.fake_engine import Faults, expected_tokens, fake_engine_command
from rekindle.units import MIB
from support.oracle import oracle_greedy
from support.replicas import ADAPTER, QUICK, begin, collect, engine_settings, request, running, tokens_of, until
from support.tiny import make_model

SLEEPY = replace(QUICK, keep_alive_s=0.05)


async def asleep(replica: Replica) -> None:
    await until(lambda: replica.state is ReplicaState.ASLEEP and replica.engine_pid is None, "the replica's sleep")


async def test_an_idle_engine_is_stopped_and_the_next_request_is_answered_by_another() -> None:
    async with running(supervision=SLEEPY) as replica:
        first = replica.engine_pid or 0
        await asleep(replica)
        assert replica.is_ready
        assert replica.ready is None
        for name in ("a", "b"):
            wanted = request(name)
            assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
            await asleep(replica)
        assert replica.wakes_total == 2
        assert [part.num_observations for part in replica.start_estimates] == [3] * len(replica.last_start_s)
        assert {part.stage for part in replica.start_estimates} == {f"start:{part}" for part, _ in replica.last_start_s}
        assert replica.restarts_total == 0
        await until(lambda: not Path(f"/proc/{first}").exists(), "the first engine's end")


async def test_an_engine_begins_with_what_the_one_before_it_has_learnt_of_loads() -> None:
    async with running(Faults(step_s=0.01), SLEEPY) as replica:
        for num_loads in range(1, 4):
            stream = replica.generate(request(str(num_loads), max_tokens=10**6))
            await anext(stream)
            await until(lambda: replica.stats is not None, "a report")
            assert replica.stats is not None
            assert [known.num_observations for known in replica.stats.load_estimates] == [num_loads]
            await stream.aclose()
            await asleep(replica)


async def test_adapters_are_there_again_after_sleep() -> None:
    async with running(supervision=SLEEPY) as replica:
        await replica.add_adapter(ADAPTER, Path("/nonexistent"))
        wanted = request("before", adapter=ADAPTER.digest)
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        await asleep(replica)
        wanted = request("after", adapter=ADAPTER.digest)
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        assert replica.wakes_total == 1


async def test_an_open_request_keeps_the_engine_however_long_it_takes() -> None:
    async with running(Faults(step_s=0.01), SLEEPY) as replica:
        pid = replica.engine_pid
        stream = await begin(replica, request("long", max_tokens=30))
        chunks = await stream.all()
        assert replica.wakes_total == 0
        assert tokens_of(chunks) == expected_tokens(request("long", max_tokens=30))
        assert replica.engine_pid in (pid, None)


async def test_requests_that_come_while_the_engine_is_being_stopped_wait_for_the_next() -> None:
    async with running(supervision=replace(QUICK, keep_alive_s=0.0)) as replica:
        for i in range(10):
            wanted = [request(f"{i}-{j}") for j in range(3)]
            found = await asyncio.gather(*(collect(replica, each) for each in wanted))
            assert [tokens_of(chunks) for chunks in found] == [expected_tokens(each) for each in wanted]
        assert replica.restarts_total == 0


async def test_an_engine_that_dies_while_it_wakes_is_started_again(tmp_path: Path) -> None:
    async with running(supervision=SLEEPY) as replica:
        await asleep(replica)
        wanted = request("r")
        answer = asyncio.create_task(collect(replica, wanted))
        await until(lambda: replica.state is ReplicaState.WAKING, "waking")
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        await until(lambda: bool(children.read_text().split()), "a new engine")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        assert tokens_of(await answer) == expected_tokens(wanted)


async def test_a_sleeping_replica_can_be_stopped() -> None:
    async with running(supervision=SLEEPY) as replica:
        await asleep(replica)
        await replica.stop()
        assert replica.state is ReplicaState.STOPPED
        with pytest.raises(ReplicaUnavailable):
            await collect(replica, request("late"))


async def test_a_model_that_slept_says_what_it_would_have_said_awake(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = make_model("llama", tmp_path / "source")
    home = Home(tmp_path / "home")
    manifest = import_model(tmp_path / "source", home)
    model_dir = str(home.model_directory(manifest.digest))
    settings = engine_settings(model=manifest, model_dir=model_dir, memory_bytes=8 * MIB)
    launcher = TemplateLauncher()
    replica = Replica(settings, SystemClock(), supervision=SLEEPY, launcher=launcher)
    try:
        await replica.start()
        wanted = request("r", 40, (3, 4, 5), temperature=0.0)
        expected = await asyncio.to_thread(oracle_greedy, model, [3, 4, 5], 40)
        for _ in range(3):
            assert list(tokens_of(await collect(replica, wanted))) == expected
            await asleep(replica)
        assert replica.wakes_total >= 2
        assert [part for part, _ in replica.last_start_s] == ["process", "imports", "kernels", "weights", "pool"]
    finally:
        await replica.stop()
        await launcher.close()


async def test_a_request_that_comes_as_the_last_one_ends_is_answered() -> None:
    async with running(supervision=replace(QUICK, keep_alive_s=0.0)) as replica:
        for i in range(3):
            first = replica.generate(request(f"first {i}", 1000))
            await anext(first)
            wanted = request(f"next {i}")
            answer = asyncio.create_task(collect(replica, wanted))
            await first.aclose()
            async with asyncio.timeout(30):
                assert tokens_of(await answer) == expected_tokens(wanted)


@pytest.mark.parametrize("num_turns", range(6))
async def test_a_request_that_comes_as_an_idle_engine_dies_is_answered(
    num_turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = asyncio.Event()
    receive = EngineLink.receive

    async def receive_or_die(link: EngineLink) -> object:
        message, death = asyncio.ensure_future(receive(link)), asyncio.ensure_future(dies.wait())
        try:
            await asyncio.wait((message, death), return_when=asyncio.FIRST_COMPLETED)
            if dies.is_set():
                dies.clear()
                raise EngineLost("it died")
            return await message
        finally:
            message.cancel()
            death.cancel()

    async with running(supervision=replace(QUICK, keep_alive_s=1000.0)) as replica:
        monkeypatch.setattr(EngineLink, "receive", receive_or_die)
        await collect(replica, request("before"))
        wanted = request("r")
        answer = asyncio.create_task(collect(replica, wanted))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        dies.set()
        async with asyncio.timeout(30):
            assert tokens_of(await answer) == expected_tokens(wanted)


class OtherThanTheFirst:
    """Launches a fake engine and then only processes of another command."""

    def __init__(self, *then: str) -> None:
        self._command, self._then = fake_engine_command(), then

    async def launch(self, connection: socket.socket, log: int) -> ChildProcess:
        command, self._command = self._command, self._then
        return await CommandLauncher(command).launch(connection, log)


@asynccontextmanager
async def cannot_wake(*then: str) -> AsyncIterator[Replica]:
    """A replica that sleeps and gets only such processes when it is to wake."""
    launcher = OtherThanTheFirst(*then)
    supervision = replace(SLEEPY, max_fruitless_crashes=2)
    replica = Replica(engine_settings(), SystemClock(), supervision=supervision, launcher=launcher)
    try:
        await replica.start()
        await asleep(replica)
        yield replica
    finally:
        await replica.stop()


HUNG = (sys.executable, "-c", "import signal; signal.pause()")


async def test_requests_that_wait_for_a_model_which_cannot_wake_are_refused() -> None:
    async with cannot_wake(*fake_engine_command(Faults(crash_at_start=True))) as replica:
        answers = await asyncio.gather(*(collect(replica, request(f"{i}")) for i in range(3)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ReplicaUnavailable] * 3
        assert not replica.is_ready


async def test_whoever_leaves_while_the_model_wakes_leaves_nothing_open() -> None:
    async with cannot_wake(*HUNG) as replica:
        reader = asyncio.create_task(collect(replica, request("r")))
        await until(lambda: replica.state is ReplicaState.WAKING, "waking")
        reader.cancel()
        await asyncio.wait([reader])
        assert not len(replica._requests)
    async with running(supervision=SLEEPY) as replica:
        await asleep(replica)
        reader = asyncio.create_task(collect(replica, request("r")))
        await until(lambda: replica.state is ReplicaState.WAKING, "waking")
        reader.cancel()
        await until(lambda: replica.wakes_total == 1 and replica.state is ReplicaState.ASLEEP, "sleep again")


async def test_a_request_whose_first_token_is_overdue_does_not_wait_for_the_model_to_wake() -> None:
    async with cannot_wake(*HUNG) as replica:
        with pytest.raises(DeadlineUnreachable, match=r"within the 0.05 s .* the replica is waking"):
            await collect(replica, replace(request("urgent"), ttft_slo_s=0.05))


async def test_an_engine_is_told_how_long_a_request_waited_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    send = EngineLink.send

    async def send_and_note(link: EngineLink, message: Message) -> None:
        sent.append(message)
        await send(link, message)

    monkeypatch.setattr(EngineLink, "send", send_and_note)
    clock = ManualClock()
    replica = Replica(engine_settings(), clock, supervision=QUICK, launcher=CommandLauncher(fake_engine_command()))
    starting = asyncio.create_task(replica.start())
    await asyncio.sleep(0)
    try:
        answer = asyncio.create_task(collect(replica, replace(request("r"), ttft_slo_s=1000.0)))
        await asyncio.sleep(0)
        clock.advance(7.0)
        await starting
        await answer
        assert [it.waited_s for it in sent if isinstance(it, GenerateRequest)] == [7.0]
    finally:
        await replica.stop()
