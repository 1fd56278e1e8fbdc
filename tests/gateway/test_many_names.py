"""Ten thousand names: what a server keeps of each, and how much a list, a page and a look-up have to read."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import pytest
from sqlalchemy import event, insert

from rekindle.catalog.catalog import Catalog
from rekindle.catalog.tables import adapter_versions, adapters
from rekindle.gateway import adapter_versions as leases
from rekindle.gateway.adapter_versions import AdapterVersions
from rekindle.gateway.app import create_app
from rekindle.protocol.adapters import AdapterManifest, LoraBinding
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.home import Home

BASE_NAME = "org/tiny:v1"
FEW, MANY = 100, 10_000
NUM_CONTENTS = 8
BYTES_A_NAME = 16
"""What a server may keep of each registered name for good: nothing; the allowance is for chance."""
INSTRUCTIONS_A_CALL = 100
"""How many instructions of SQLite's machine pass between two calls of the counter."""


def manifest(base, digit: int) -> AdapterManifest:
    bindings = tuple(
        LoraBinding(f"model.layers.{layer}.self_attn.q_proj", "q_proj", layer, 8, 2.0, 64, 64, 0, 512)
        for layer in range(6)
    )
    return AdapterManifest(AdapterDigest(f"{digit:064x}"), base, "F32", 20_480, (8,), ("q_proj",), bindings)


def register_all(catalog: Catalog, manifests: list[AdapterManifest]) -> None:
    """What `register_adapter` writes for each, in one transaction."""
    named = [(f"adapter-{i:05}", manifest) for i, manifest in enumerate(manifests)]
    stored = {it.digest: msgspec.to_builtins(it) for it in manifests}
    versions = [
        {
            "adapter_name": name, "version": 1, "digest": it.digest, "base_digest": it.base,
            "manifest": stored[it.digest], "source": "/somewhere", "created_s": 1,
        }
        for name, it in named
    ]  # fmt: skip
    with catalog._writing() as connection:
        connection.execute(
            insert(adapters), [{"name": name, "base_name": BASE_NAME, "version": 1} for name, _ in named]
        )
        connection.execute(insert(adapter_versions), versions)


class Work:
    """Instructions of SQLite's machine, on all connections of a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._count = 0
        event.listen(catalog._engine, "connect", self._watch)
        catalog.close()  # connections opened from here on are watched

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        before, found = self._count, [0]
        yield found
        found[0] = (self._count - before) * INSTRUCTIONS_A_CALL

    def _watch(self, connection: sqlite3.Connection, _: object) -> None:
        connection.set_progress_handler(self._note, INSTRUCTIONS_A_CALL)

    def _note(self) -> int:
        self._count += 1
        return 0


class Served:
    """A gateway over a catalog of so many names, in this process."""

    def __init__(self, home: Home, services, num_names: int, num_contents: int = NUM_CONTENTS) -> None:
        self.catalog = Catalog.open(home)
        base = services.bases[0]
        home.model_directory(base.manifest.digest).mkdir()
        self.catalog.add_model(BASE_NAME, base.manifest)
        contents = [manifest(base.manifest.digest, i) for i in range(num_contents)]
        register_all(self.catalog, [contents[i % num_contents] for i in range(num_names)])
        self.work = Work(self.catalog)
        self.services = replace(services, catalog=self.catalog)
        transport = httpx.ASGITransport(create_app(self.services))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://server")

    async def get(self, path: str) -> httpx.Response:
        response = await self.client.get(path)
        assert response.status_code == 200, response.text
        return response

    async def work_of(self, path: str) -> int:
        await self.get(path)
        with self.work.counted() as found:
            await self.get(path)
        return found[0]


@pytest.fixture
def serve(make_services, tmp_path: Path):
    served: list[Served] = []

    def make(num_names: int, num_contents: int = NUM_CONTENTS) -> Served:
        home = Home(tmp_path / f"home-{len(served)}")
        served.append(Served(home, make_services(), num_names, num_contents))
        return served[-1]

    yield make
    for one in served:
        one.catalog.close()


async def test_the_list_of_models_takes_work_and_bytes_in_proportion_to_the_names(serve):
    few, many = serve(FEW), serve(MANY)
    of_few, of_many = [(await served.get("/v1/models")) for served in (few, many)]
    assert [len(response.json()["data"]) for response in (of_few, of_many)] == [FEW + 1, MANY + 1]
    assert len(of_many.content) <= 1.1 * MANY / FEW * len(of_few.content)
    work_few, work_many = await few.work_of("/v1/models"), await many.work_of("/v1/models")
    assert 0 < work_many <= 1.5 * MANY / FEW * work_few
    assert many.catalog._manifests == {}, "a list of names reads no manifest"


async def test_a_page_of_adapters_reads_that_page_however_many_there_are(serve):
    few, many = serve(FEW), serve(MANY)
    page = (await many.get("/v1/adapters?limit=50&after=adapter-09000")).json()
    assert [item["id"] for item in page["data"]] == [f"adapter-{i:05}" for i in range(9001, 9051)]
    assert page["has_more"]
    last = (await many.get(f"/v1/adapters?limit=50&after=adapter-{MANY - 11:05}")).json()
    assert (len(last["data"]), last["has_more"]) == (10, False)
    work_few = await few.work_of("/v1/adapters?limit=50&after=adapter-00010")
    work_many = await many.work_of("/v1/adapters?limit=50&after=adapter-09000")
    assert 0 < work_many <= 1.5 * work_few


@pytest.mark.parametrize("path", ["/v1/models/adapter-00050", "/v1/adapters/adapter-00050"])
async def test_looking_up_one_name_does_not_read_the_others(serve, path):
    few, many = serve(FEW), serve(MANY)
    work_few, work_many = await few.work_of(path), await many.work_of(path)
    assert work_many <= 1.5 * work_few + 10 * INSTRUCTIONS_A_CALL


async def test_whether_a_version_is_named_is_found_without_reading_all_names(serve):
    few, many = serve(FEW), serve(MANY)
    base = many.services.bases[0].manifest.digest
    digests = [manifest(base, 0).digest, manifest(base, 999).digest]
    work = []
    for served in (few, many):
        with served.work.counted() as found:
            assert [served.catalog.is_named(digest) for digest in digests] == [True, False]
        work.append(found[0])
    assert work[1] <= 1.5 * work[0] + 10 * INSTRUCTIONS_A_CALL


async def test_a_server_keeps_nothing_for_a_name_that_is_registered(serve):
    """The list, some pages, and requests for some, over ten thousand names of as many contents, each with 6
    matrices; memory that is still held afterwards is counted."""
    served = serve(MANY, MANY)
    names = [f"adapter-{i:05}" for i in range(0, MANY, 100)]

    async def use() -> None:
        await served.get("/v1/models")
        for after in (0, 1000, 9000):
            page = (await served.get(f"/v1/adapters?limit=1000&after=adapter-{after:05}")).json()
            assert page["data"]
        for name in names:
            body = {"model": name, "prompt": "hello", "max_tokens": 1}
            reply = await served.client.post("/v1/completions", json=body)
            assert reply.status_code == 200, reply.text
            served.services.bases[0].replica.requests.clear()

    tracemalloc.start()
    try:
        await use()
        gc.collect()
        held_before = tracemalloc.get_traced_memory()[0]
        await use()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held - held_before <= BYTES_A_NAME * MANY
    assert len(served.catalog._manifests) <= 2000


async def test_versions_that_nobody_uses_are_forgotten_with_their_replica(serve, monkeypatch):
    monkeypatch.setattr(leases, "MAX_IDLE_VERSIONS", 16)
    served = serve(200, 200)
    base, versions = served.services.bases[0], AdapterVersions(served.catalog)
    found = served.catalog.adapter_page([base.manifest.digest], None, 200)
    resident = found[0].manifest.digest
    base.replica.stats = replace(base.replica.stats, resident_adapters=(resident,))
    async with versions.lease(base, found[1]):
        for adapter in found:
            async with versions.lease(base, adapter):
                assert adapter.manifest.digest in base.replica.adapters
            assert len(base.replica.adapters) == len(versions) <= 16 + 16 // 8 + 3
        assert found[1].manifest.digest in base.replica.adapters, "it is leased"
    assert resident in base.replica.adapters
    assert found[-1].manifest.digest in base.replica.adapters
    assert found[100].manifest.digest not in base.replica.adapters
    async with versions.lease(base, found[100]):
        assert found[100].manifest.digest in base.replica.adapters, "a request brings it back"


async def test_a_version_leased_while_it_is_being_forgotten_stays(serve, monkeypatch):
    monkeypatch.setattr(leases, "MAX_IDLE_VERSIONS", 4)
    served = serve(5, 5)
    base, versions = served.services.bases[0], AdapterVersions(served.catalog)
    found = served.catalog.adapter_page([base.manifest.digest], None, 5)
    remove, is_removing, may_remove = base.replica.remove_adapter, asyncio.Event(), asyncio.Event()

    async def remove_later(digest: AdapterDigest) -> None:
        assert digest == found[0].manifest.digest
        is_removing.set()
        await may_remove.wait()
        await remove(digest)

    async def use_all() -> None:
        for adapter in found:
            async with versions.lease(base, adapter):
                pass

    monkeypatch.setattr(base.replica, "remove_adapter", remove_later)
    using = asyncio.create_task(use_all())
    await is_removing.wait()
    asyncio.get_running_loop().call_soon(may_remove.set)
    async with versions.lease(base, found[0]):
        await using
        assert found[0].manifest.digest in base.replica.adapters
