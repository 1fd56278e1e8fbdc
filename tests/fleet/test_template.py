"""Engines forked off a template: real processes, with the fake engine in place of a model."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rekindle.clock import SystemClock
from rekindle.errors import EngineFailed
from rekindle.fleet.host_memory import HostMemoryNode
from rekindle.fleet.launch import TEMPLATE_COMMAND, TemplateLauncher
from rekindle.fleet.link import EngineLink, EngineLost
from rekindle.fleet.replica import Replica
from rekindle.testing.fake_engine import expected_tokens
from support.replicas import QUICK, collect, engine_settings, request, tokens_of, until
from support.server import is_alive

TEMPLATE = (
    sys.executable,
    "-c",
    "from rekindle.engine.template import main\n"
    "from rekindle.testing.fake_engine import FakeEngine, Faults\n"
    "main(lambda settings, clock, wake: FakeEngine(settings, Faults()))",
)


@asynccontextmanager
async def template(*command: str) -> AsyncIterator[TemplateLauncher]:
    launcher = TemplateLauncher(command or TEMPLATE)
    try:
        yield launcher
    finally:
        await launcher.close()


@asynccontextmanager
async def forked(launcher: TemplateLauncher) -> AsyncIterator[Replica]:
    replica = Replica(engine_settings(), SystemClock(), supervision=QUICK, launcher=launcher)
    await replica.start()
    try:
        yield replica
    finally:
        await replica.stop()


def parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid"))


async def test_two_engines_of_one_template_answer_as_engines_of_their_own_do() -> None:
    async with template() as launcher, forked(launcher) as one, forked(launcher) as other:
        assert one.engine_pid != other.engine_pid
        assert parent_of(one.engine_pid or 0) == parent_of(other.engine_pid or 0)
        for replica in (one, other):
            wanted = request("r")
            assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)


async def test_a_template_has_one_thread_since_a_fork_takes_no_other_and_holds_nothing_of_its_engines() -> None:
    """The real one, with all its libraries: a lock that another thread holds would stay locked in a fork."""
    async with template(*TEMPLATE_COMMAND) as launcher:
        link = await EngineLink.spawn(launcher)
        try:
            mother = Path(f"/proc/{parent_of(link.pid)}")
            assert len(list((mother / "task").iterdir())) == 1
            kinds = (str(it.readlink()).partition(":")[0] for it in (mother / "fd").iterdir() if int(it.name) > 2)
            held = Counter(kinds)
            assert (held["socket"], held["pipe"]) == (1, 0)
        finally:
            await link.close(0.0)


async def test_a_killed_engine_is_replaced_and_its_end_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async with template() as launcher, forked(launcher) as replica:
        first = replica.engine_pid or 0
        os.kill(first, signal.SIGKILL)
        await until(lambda: replica.restarts_total == 1 and replica.is_ready, "another engine")
        assert f"engine process {first} was killed by SIGKILL" in caplog.text
        assert not is_alive(first)
        wanted = request("r")
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)


async def test_engines_outlive_their_template_and_the_next_gets_a_new_one() -> None:
    async with template() as launcher, forked(launcher) as one:
        old = parent_of(one.engine_pid or 0)
        os.kill(old, signal.SIGKILL)
        await until(lambda: not is_alive(old), "the template's end")
        wanted = request("r")
        assert tokens_of(await collect(one, wanted)) == expected_tokens(wanted)
        async with forked(launcher) as other:
            assert parent_of(other.engine_pid or 0) != old
        orphan = one.engine_pid or 0
        os.kill(orphan, signal.SIGKILL)
        await until(lambda: one.restarts_total == 1 and one.is_ready, "another engine after an orphan's death")
        assert one.engine_pid != orphan


async def test_a_template_that_dies_at_its_start_fails_the_launch() -> None:
    async with template(sys.executable, "-c", "raise SystemExit(3)") as launcher:
        with pytest.raises(EngineLost, match="template has died"):
            await EngineLink.spawn(launcher)


async def test_a_template_that_cannot_be_run_fails_the_launch() -> None:
    async with template("/nonexistent/python") as launcher:
        with pytest.raises(EngineLost, match="could not be started"):
            await EngineLink.spawn(launcher)


async def test_a_template_that_says_nothing_fails_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rekindle.fleet.launch._START_S", 0.05)
    async with template(sys.executable, "-c", "import time; time.sleep(600)") as launcher:
        with pytest.raises(EngineLost, match="did not answer within"):
            await EngineLink.spawn(launcher)


async def test_what_a_fork_writes_to_its_log_is_relayed(caplog: pytest.LogCaptureFixture) -> None:
    command = (
        sys.executable,
        "-c",
        "from rekindle.engine.template import main\n"
        "def fail(settings, clock, wake): raise OSError('no luck')\n"
        "main(fail)",
    )
    async with template(*command) as launcher:
        replica = Replica(engine_settings(), SystemClock(), supervision=QUICK, launcher=launcher)
        with caplog.at_level(logging.INFO), pytest.raises(Exception, match="no luck"):
            await replica.start()
        assert "the engine failed" in caplog.text


async def test_no_descriptor_is_left_behind() -> None:
    async def once() -> None:
        async with template() as launcher, forked(launcher) as replica:
            os.kill(replica.engine_pid or 0, signal.SIGKILL)
            await until(lambda: replica.restarts_total == 1 and replica.is_ready, "another engine")

    await once()
    await asyncio.sleep(0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await once()
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_forks_share_no_connection_with_each_other() -> None:
    """An engine that held another's socket would keep its peer from noticing that it died."""
    async with template() as launcher, forked(launcher) as one, forked(launcher) as other:

        def sockets(pid: int) -> set[str]:
            links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
            return {link for link in links if link.startswith("socket:")}

        of_engines = [sockets(replica.engine_pid or 0) for replica in (one, other)]
        assert all(len(found) == 1 for found in of_engines)
        assert not of_engines[0] & of_engines[1]
        assert not sockets(parent_of(one.engine_pid or 0)) & (of_engines[0] | of_engines[1])


HUNG = (sys.executable, "-c", "import signal; signal.pause()")

TEMPLATE_LIKE = """
import socket, sys, msgspec
from rekindle.protocol.template import Ended, Forked, Ready
control = socket.socket(fileno=int(sys.argv[2]))
say = lambda answer: control.send(msgspec.msgpack.encode(answer))
say(Ready())
control.recv(100)
"""


def template_that(does: str) -> tuple[str, ...]:
    """A process that is ready as a template is, and does something else when it is asked for an engine."""
    return (sys.executable, "-c", TEMPLATE_LIKE + does)


async def test_a_stop_does_not_wait_for_a_template_that_is_not_ready() -> None:
    async with template(*HUNG) as launcher:
        replica = Replica(engine_settings(), SystemClock(), supervision=QUICK, launcher=launcher)
        starting = asyncio.create_task(replica.start())
        await until(launcher._lock.locked, "the launch")
        async with asyncio.timeout(30):
            await replica.stop()
        with pytest.raises(EngineFailed):
            await starting


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("raise SystemExit", "has died"),
        ("control.send(b'torn'); control.recv(100)", "has died"),
        ("say(Ready()); control.recv(100)", "has died"),
        ("say(Forked(1)); control.recv(100)", "has died"),
        ("say(Ended(1, 0)); raise SystemExit", "has died"),
    ],
)
async def test_a_template_that_dies_or_talks_nonsense_when_it_is_to_fork_fails_the_launch(
    does: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rekindle.fleet.launch._FORK_S", 1000.0)
    async with template(*template_that(does)) as launcher, asyncio.timeout(30):
        with pytest.raises(EngineLost, match=message):
            await EngineLink.spawn(launcher)


SLOW_TO_FORK = """
import os, sys, time
from pathlib import Path
from rekindle.engine.template import main
from rekindle.testing.fake_engine import FakeEngine, Faults
fork = os.fork
may_fork = Path(sys.argv.pop(1))
def fork_when_told():
    Path(f"{may_fork}.asked").touch()
    while not may_fork.exists():
        time.sleep(0.002)
    return fork()
os.fork = fork_when_told
main(lambda settings, clock, wake: FakeEngine(settings, Faults()))
"""


async def test_an_engine_that_nobody_waits_for_any_more_is_ended(tmp_path: Path) -> None:
    may_fork = tmp_path / "may-fork"
    async with template(sys.executable, "-c", SLOW_TO_FORK, str(may_fork)) as launcher:
        abandoned = asyncio.create_task(EngineLink.spawn(launcher))
        await until(Path(f"{may_fork}.asked").exists, "the fork's being asked for")
        abandoned.cancel()
        await asyncio.wait([abandoned])
        may_fork.touch()
        async with forked(launcher) as replica:
            mother = parent_of(replica.engine_pid or 0)
            children = Path(f"/proc/{mother}/task/{mother}/children")
            await until(lambda: children.read_text().split() == [str(replica.engine_pid)], "the end of the other")


PR_SET_CHILD_SUBREAPER = 36


async def test_no_zombie_is_left_where_nobody_else_reaps_orphans(caplog: pytest.LogCaptureFixture) -> None:
    """As in a container whose first process is the server."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
    try:
        async with template() as launcher, forked(launcher) as replica:
            orphan = replica.engine_pid or 0
            mother = parent_of(orphan)
            os.kill(mother, signal.SIGKILL)
            await until(lambda: not is_alive(mother), "the template's end")
            os.kill(orphan, signal.SIGKILL)
            await until(lambda: replica.restarts_total == 1 and replica.is_ready, "another engine")
            assert f"engine process {orphan} was killed by SIGKILL" in caplog.text
            assert not Path(f"/proc/{orphan}").exists()
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)


async def test_an_engine_starts_without_the_host_memory_that_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rekindle.fleet.host_memory._COMMAND", ("/nonexistent/python",))
    launcher = TemplateLauncher(TEMPLATE, HostMemoryNode(0))
    try:
        async with forked(launcher) as replica:
            wanted = request("r")
            assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        assert "an engine starts without host memory: /nonexistent/python could not be started" in caplog.text
    finally:
        await launcher.close()
