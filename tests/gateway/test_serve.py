"""The server as a whole, told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from rekindle.catalog.records import ModelRecord
from rekindle.cli import main
from rekindle.cli.engines import engine_settings
from rekindle.cli.server import RekindleServer, _by_content
from rekindle.cli.settings import EngineOptions, ServerSettings, Settings
from rekindle.config import Bytes
from rekindle.errors import ConfigurationError
from rekindle.protocol.identity import ModelDigest
from rekindle.protocol.models import ModelManifest
from rekindle.units import GIB

BODY = {"model": "org/tiny:v1", "prompt": "hello", "max_tokens": 400}


@dataclass
class Serving:
    """A server that listens, the exit code to come, a client of it, and a request that waits for the replica."""

    exit_code: asyncio.Task[int]
    client: httpx.AsyncClient
    open_request: asyncio.Task[httpx.Response]


@pytest.fixture
def serving(make_services):
    @asynccontextmanager
    async def serving(drain_s: float) -> AsyncIterator[Serving]:
        services = make_services()
        replica = services.bases[0].replica
        replica.hold_after = 1
        server = RekindleServer(Settings(ServerSettings(port=0, drain_s=drain_s)), services, [], show_examples=False)
        exit_code = asyncio.create_task(server.run())
        await server._http.listening.wait()
        port = server._http.servers[0].sockets[0].getsockname()[1]
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            open_request = asyncio.create_task(client.post("/v1/completions", json=BODY))
            while not replica.active:
                await asyncio.sleep(0.002)
            serving.replica = replica
            yield Serving(exit_code, client, open_request)
            open_request.cancel()
            await asyncio.gather(open_request, return_exceptions=True)

    return serving


@pytest.mark.parametrize("host", ["127.0.0.1", "no such host", "a" * 70])
async def test_an_address_that_cannot_be_listened_on_is_a_configuration_error(make_services, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(ServerSettings(host=host, port=taken.getsockname()[1]))
        server = RekindleServer(settings, make_services(), [], show_examples=False)
        with pytest.raises(ConfigurationError, match=f"cannot listen on {host}, port"):
            await server.run()


@pytest.mark.parametrize("arguments", [["--port", "99999"], ["--port", "-1"], ["--set", "server.port=true"]])
def test_a_port_that_does_not_exist_is_refused_in_words(arguments, tmp_path, capsys):
    assert main(["serve", "--home", str(tmp_path), *arguments]) == 1
    assert "port must" in capsys.readouterr().err


def test_names_of_the_same_content_share_one_engine():
    def record(name: str, digest: str) -> ModelRecord:
        manifest = ModelManifest(ModelDigest(digest), "llama", "F32", 1, 4, 1, 400, 512, (), True, ())
        return ModelRecord(name, manifest, Path("/nonexistent"), 0)

    groups = _by_content([record("a", "1"), record("b", "2"), record("c", "1")])
    assert [[same.name for same in group] for group in groups] == [["a", "c"], ["b"]]


def test_merged_weights_take_their_memory_from_the_pool_of_each_model():
    manifest = ModelManifest(ModelDigest("d"), "llama", "F32", GIB // 4, GIB, 1, 400, 512, (), True, ())
    records = [ModelRecord(name, manifest, Path("/nonexistent"), 0) for name in ("a", "b")]

    def pools(merge_bytes: int) -> list[tuple[int, int]]:
        options = EngineOptions(dtype="float32", memory=Bytes(8 * GIB), merge_bytes=Bytes(merge_bytes))
        return [(settings.memory_bytes, settings.merge_bytes) for settings in engine_settings(options, records)]

    assert pools(0) == [(3 * GIB, 0)] * 2
    assert pools(GIB) == [(2 * GIB, GIB)] * 2
    with pytest.raises(ConfigurationError, match=r"beside 6.* for copies to merge into.*engine\.merge_bytes"):
        pools(3 * GIB)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


async def test_a_server_told_to_stop_refuses_in_words_until_open_requests_have_ended(serving):
    async with serving(drain_s=1000.0) as running:
        send(signal.SIGTERM)
        while (ready := await running.client.get("/ready")).status_code == 200:
            await asyncio.sleep(0.002)
        assert ready.json()["status"] == "draining"
        refused = await running.client.post("/v1/completions", json=BODY)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert not running.exit_code.done()
        serving.replica.release()
        assert (await running.open_request).json()["choices"][0]["text"] == "the quick brown fox"
        assert await running.exit_code == 0
        with pytest.raises(httpx.ConnectError):
            await running.client.get("/ready")


async def test_a_second_signal_does_not_wait_for_open_requests(serving):
    async with serving(drain_s=1000.0) as running:
        send(signal.SIGTERM)
        while (await running.client.get("/ready")).status_code == 200:
            await asyncio.sleep(0.002)
        send(signal.SIGINT)
        assert await running.exit_code == 0
        assert serving.replica.num_yielded == 1, "it still waited for its second token"


async def test_open_requests_are_given_up_when_the_time_to_drain_is_over(serving):
    async with serving(drain_s=0.01) as running:
        send(signal.SIGTERM)
        assert await running.exit_code == 0
        assert not serving.replica.active


class Part:
    """A replica, or what it leans on, that says when it was told to end and ends when all have been."""

    def __init__(self, told: list[Part], num_parts: int) -> None:
        self._told, self._num_parts = told, num_parts

    async def start(self) -> None:
        return

    async def stop(self) -> None:
        self._told.append(self)
        while len(self._told) < self._num_parts:
            await asyncio.sleep(0.002)

    close = stop


async def test_engines_are_stopped_side_by_side(make_services):
    told: list[Part] = []
    replicas = [Part(told, 3) for _ in range(3)]
    server = RekindleServer(Settings(ServerSettings(port=0)), make_services(), replicas, show_examples=False)
    exit_code = asyncio.create_task(server.run())
    await server._http.listening.wait()
    send(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await exit_code == 0
    assert set(told) == set(replicas)


async def test_a_server_that_cannot_say_that_it_is_ready_stops_everything_in_the_end(make_services, monkeypatch):
    has_failed = asyncio.Event()

    def fail(*_args, **_kwargs):
        has_failed.set()
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr("builtins.print", fail)
    told: list[Part] = []
    replica, helper = Part(told, 1), Part(told, 1)
    server = RekindleServer(Settings(ServerSettings(port=0)), make_services(), [replica], [helper], show_examples=False)
    running = asyncio.create_task(server.run())
    await has_failed.wait()
    send(signal.SIGTERM)
    with pytest.raises(BrokenPipeError):
        await running
    assert told == [replica, helper]
