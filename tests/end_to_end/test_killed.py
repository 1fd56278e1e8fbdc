"""Processes of a real server killed one after the other: streams go on, and nobody outlives the server."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from support.server import Server, children, rekindle, start, stop
from support.tiny import make_model

pytest.importorskip("transformers")

TEMPLATE, NODE, ENGINE = "rekindle.engine.template", "rekindle.store.node", "engine"
SETTINGS = ('engine.memory="80MiB"', "engine.threads=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("killed")
    make_model("llama", directory / "source")
    added = rekindle("models", "add", str(directory / "source"), "--name", "tiny", home=directory / "home")
    assert added.returncode == 0, added.stderr
    return directory / "home"


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    return [pid, *(found for child in children(pid) for found in family(child))]


@contextmanager
def watched(pids: list[int]) -> Iterator[list[int]]:
    """Descriptors by which the end of processes is seen, whatever becomes of their numbers."""
    with ExitStack() as stack:
        pidfds = [os.pidfd_open(pid) for pid in pids]
        for pidfd in pidfds:
            stack.callback(os.close, pidfd)
        yield pidfds


def wait_for_end(pidfds: list[int]) -> None:
    left = set(pidfds)
    while left:
        ended, _, _ = select.select(left, [], [], 60)
        assert ended, f"{len(left)} processes are left behind"
        left -= set(ended)


def complete(server: Server) -> str:
    body = {"model": "tiny", "prompt": [3, 4, 5], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def pid_of(server: Server, which: str) -> int:
    return server.engine_pids()[0] if which == ENGINE else server.helper_pid(which)


@pytest.mark.parametrize("victims", [(), (TEMPLATE,), (NODE,), (ENGINE,), (TEMPLATE, NODE, ENGINE), (ENGINE, TEMPLATE)])
def test_whoever_is_killed_before_requests_are_answered_and_nobody_outlives_the_server(
    victims: tuple[str, ...], home: Path
) -> None:
    server = start(home, *SETTINGS)
    assert server.process.stdout is not None
    with server.process.stdout:
        text = complete(server)
        pids = [pid_of(server, which) for which in victims]
        with watched(family(server.process.pid)) as before:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                assert complete(server) == text
            assert httpx.get(f"{server.url}/metrics", timeout=60).status_code == 200
            with watched(family(server.process.pid)) as after:
                server.process.kill()
                server.process.wait()
                wait_for_end(before + after)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("moment", [TEMPLATE, ENGINE])
def test_a_server_told_to_end_while_it_starts_leaves_nobody_behind(
    how: signal.Signals, moment: str, home: Path
) -> None:
    command = [sys.executable, "-m", "rekindle", "serve", "--home", str(home), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    generation = {TEMPLATE: 2, ENGINE: 3}[moment]
    while depth(server.pid) < generation:
        assert server.poll() is None
        time.sleep(0.002)
    with watched(family(server.pid)) as pidfds:
        server.send_signal(how)
        server.wait(60)
        wait_for_end(pidfds)


def depth(pid: int) -> int:
    """Of the family: 1 for a process without children."""
    return 1 + max((depth(child) for child in children(pid)), default=0)


def test_a_server_that_is_stopped_ends_all_its_processes(home: Path) -> None:
    server = start(home, *SETTINGS, "engine.keep_alive_s=0")
    with watched(family(server.process.pid)) as pidfds:
        complete(server)
        assert stop(server) == 0
        wait_for_end(pidfds)
