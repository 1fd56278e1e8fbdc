"""Engines forked off a template: real processes, with the fake engine in place of a model."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rekindle.clock import SystemClock
from rekindle.fleet.launch import TemplateLauncher
from rekindle.fleet.link import EngineLink, EngineLost
from rekindle.fleet.replica import Replica
from rekindle.testing.fake_engine import expected_tokens
from support.replicas import QUICK, collect, engine_settings, request, tokens_of, until

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


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


async def test_two_engines_of_one_template_answer_as_engines_of_their_own_do() -> None:
    async with template() as launcher, forked(launcher) as one, forked(launcher) as other:
        assert one.engine_pid != other.engine_pid
        assert parent_of(one.engine_pid or 0) == parent_of(other.engine_pid or 0)
        for replica in (one, other):
            wanted = request("r")
            assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)


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
