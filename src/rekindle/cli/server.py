"""What `rekindle serve` runs: join catalog, replicas and gateway, and run them until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import uvicorn

from rekindle import config
from rekindle.catalog.catalog import Catalog
from rekindle.catalog.records import ModelRecord
from rekindle.cli.engines import engine_settings
from rekindle.cli.examples import print_examples
from rekindle.cli.settings import Settings, available_memory_bytes, home_directory
from rekindle.clock import SystemClock
from rekindle.errors import ConfigurationError
from rekindle.fleet.control import BegunHelper
from rekindle.fleet.host_memory import HostMemoryNode
from rekindle.fleet.launch import TemplateLauncher
from rekindle.fleet.replica import Replica
from rekindle.fleet.supervision import Supervision
from rekindle.gateway.app import create_app
from rekindle.gateway.lifecycle import Lifecycle
from rekindle.gateway.seams import ServedBase, Services
from rekindle.gateway.settings import GatewaySettings
from rekindle.protocol.adapters import ADAPTER_FILE_NAME, AdapterManifest
from rekindle.protocol.identity import ModelDigest
from rekindle.protocol.models import ModelManifest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.storage_profile import profile_of

_BACKLOG = 2048
_LAST_BYTES_S = 1
"""How long connections may take to hand over what is finished, once nothing is in progress or may be any longer."""

_logger = logging.getLogger(__name__)


def run_server(arguments: argparse.Namespace, template: BegunHelper) -> int:
    """Serve until SIGTERM or SIGINT, then drain and stop. Engines are forks of the template."""
    settings = config.load(Settings, arguments.config, [*arguments.overrides, *_address_overrides(arguments)])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    home = Home(home_directory(arguments.home))
    with Catalog.open(home) as catalog:
        catalog.remove_unreferenced()
        with home.using():
            server = _build(arguments, settings, home, catalog, template)
            return asyncio.run(server.run())


class _Server(uvicorn.Server):
    """An HTTP server that leaves signals to `RekindleServer` and says when it listens."""

    def __init__(self, configuration: uvicorn.Config) -> None:
        super().__init__(configuration)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Closable(Protocol):
    async def close(self) -> None: ...


class RekindleServer:
    """The running whole: one gateway, a replica for each base, and what these lean on, which is closed in order."""

    def __init__(
        self,
        settings: Settings,
        services: Services,
        replicas: list[Replica],
        helpers: Sequence[_Closable] = (),
        *,
        show_examples: bool,
    ) -> None:
        self._settings, self._services = settings, services
        self._replicas, self._helpers = replicas, helpers
        self._show_examples = show_examples
        self._http = _Server(
            uvicorn.Config(
                create_app(services),
                host=settings.server.host,
                port=settings.server.port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_LAST_BYTES_S,
            )
        )
        self._draining: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Listen at once, start the engines beside, and stop in the opposite order; returns the exit code.

        Raises:
            ConfigurationError: the address cannot be listened on.
        """
        listener = _listen(self._settings.server.host, self._settings.server.port)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._begin_stopping)
        starting = asyncio.create_task(self._start_replicas(), name="start-replicas")
        try:
            await self._http.serve(sockets=[listener])
        finally:
            tasks = [starting] if self._draining is None else [starting, self._draining]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await asyncio.gather(*(replica.stop() for replica in self._replicas))
            for helper in self._helpers:
                await helper.close()
        if starting.done() and not starting.cancelled() and (error := starting.exception()) is not None:
            raise error
        return 0 if self._http.started else 1

    def _begin_stopping(self) -> None:
        """The first signal drains, the second does not wait."""
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(), name="drain")
        else:
            self._http.force_exit = self._http.should_exit = True

    async def _drain(self) -> None:
        """Listen on, to refuse what is new in words, until what is open has ended or its time is up; then exit."""
        lifecycle, limit_s = self._services.lifecycle, self._settings.server.drain_s
        lifecycle.begin_draining()
        try:
            async with asyncio.timeout(limit_s):
                await lifecycle.idle()
        except TimeoutError:
            _logger.warning("%d requests did not end within server.drain_s = %g s", lifecycle.num_active, limit_s)
        self._http.should_exit = True

    async def _start_replicas(self) -> None:
        try:
            await asyncio.gather(*(replica.start() for replica in self._replicas))
        except BaseException:
            self._http.should_exit = True
            raise
        await self._http.listening.wait()
        port = self._http.servers[0].sockets[0].getsockname()[1]
        await self._announce(f"http://{self._settings.server.host}:{port}")

    async def _announce(self, url: str) -> None:
        names = ", ".join(name for base in self._services.bases for name in base.names)
        bases = [base.manifest.digest for base in self._services.bases]
        listed = await asyncio.to_thread(self._services.catalog.adapter_names, bases)
        adapters = [adapter.name for adapter in listed]
        print(f"rekindle: ready on {url} serving {names} with {len(adapters)} adapters", flush=True)
        if self._show_examples:
            print_examples(url, self._services.bases[0].name, adapters)


def _address_overrides(arguments: argparse.Namespace) -> list[str]:
    given = {name: getattr(arguments, name) for name in ("host", "port")}
    return [f"server.{name}={json.dumps(value)}" for name, value in given.items() if value is not None]


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(
            f"cannot listen on {host}, port {port}: {error}; choose others with --host and --port"
        ) from error


def _build(
    arguments: argparse.Namespace, settings: Settings, home: Home, catalog: Catalog, template: BegunHelper
) -> RekindleServer:
    models = _by_content(_records(catalog, arguments.models))
    server = settings.server
    clock = SystemClock()
    storage = profile_of(home.root)
    engines = engine_settings(settings.engine, [record for record, *_ in models], storage)
    keep_alive_s = math.inf if settings.engine.keep_alive_s is None else settings.engine.keep_alive_s
    supervision = Supervision(silence_s=settings.engine.step_limit_s, keep_alive_s=keep_alive_s)
    idle_bytes = settings.store.idle_memory
    node = HostMemoryNode(available_memory_bytes() // 4 if idle_bytes is None else idle_bytes)
    launcher = TemplateLauncher(node=node, begun=template)
    replicas = [
        Replica(engine, clock, name=record.name, supervision=supervision, launcher=launcher)
        for engine, (record, *_) in zip(engines, models, strict=True)
    ]
    bases = tuple(
        ServedBase(
            record.name, record.manifest, record.path, replica, record.created_s, tuple(same.name for same in others)
        )
        for (record, *others), replica in zip(models, replicas, strict=True)
    )

    def import_from(source: Path, base: ModelManifest) -> tuple[AdapterManifest, Path]:
        manifest = import_adapter(source, base, home.model_directory(base.digest), home)
        return manifest, home.adapter_directory(manifest.digest) / ADAPTER_FILE_NAME

    gateway = GatewaySettings(
        adapter_roots=tuple(Path(root).expanduser() for root in server.adapter_roots),
        max_body_bytes=server.max_body_bytes,
    )
    services = Services(bases, catalog, import_from, gateway, clock, Lifecycle(), node.snapshot, storage)
    return RekindleServer(settings, services, replicas, (launcher, node), show_examples=arguments.example)


def _records(catalog: Catalog, names: list[str]) -> list[ModelRecord]:
    if names:
        return [catalog.model(name) for name in dict.fromkeys(names)]
    if records := catalog.models():
        return records
    raise ConfigurationError("no model has been imported; run `rekindle models add PATH --name NAME` first")


def _by_content(records: list[ModelRecord]) -> list[list[ModelRecord]]:
    """Records grouped by model: names of the same content share one engine."""
    groups: dict[ModelDigest, list[ModelRecord]] = {}
    for record in records:
        groups.setdefault(record.manifest.digest, []).append(record)
    return list(groups.values())
