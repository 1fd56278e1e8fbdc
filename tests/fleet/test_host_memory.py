"""Engines that share memory through a node process: real processes and real anonymous files."""

from __future__ import annotations

import asyncio
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from rekindle.clock import SystemClock
from rekindle.engine.arena import ArenaMismatch, SharedArena
from rekindle.fleet.host_memory import HostMemoryNode
from rekindle.fleet.launch import TemplateLauncher
from rekindle.fleet.replica import Replica
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.tiers import AskSnapshot, Attach, Lease, Publish
from rekindle.store.anonymous_file import new_file
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.store.tier_client import TierClient
from rekindle.units import MIB
from support.nodes import client, node
from support.replicas import QUICK, collect, engine_settings, request, tokens_of, until
from support.tiny import make_model


def filled(value: int, calls: list[int]) -> Callable[[torch.Tensor], None]:
    def fill(tensor: torch.Tensor) -> None:
        calls.append(value)
        tensor.fill_(value)

    return fill


async def make(tier: TierClient, calls: list[int], sizes: tuple[int, ...] = (10, 5000)) -> list[torch.Tensor]:
    def work() -> list[torch.Tensor]:
        arena = SharedArena(tier, "weights", "BF16", 64 * MIB, SystemClock())
        try:
            tensors = [arena.take(size, torch.int32, filled(size, calls)) for size in sizes]
            arena.publish()
            return tensors
        finally:
            arena.close()

    return await asyncio.to_thread(work)


async def test_what_one_engine_laid_out_another_maps_without_any_work() -> None:
    async with node() as memory:
        calls: list[int] = []
        one = await make(await client(memory), calls)
        other = await make(await client(memory), calls)
        assert calls == [10, 5000]
        for first, second in zip(one, other, strict=True):
            assert torch.equal(first, second)
        assert [tensor.tolist()[-1] for tensor in other] == [10, 5000]
        snapshot = await memory.snapshot()
        assert [(it.name, it.num_leases) for it in snapshot.objects] == [("weights", 2)]
        assert snapshot.objects[0].num_bytes == 4096 + 20480


async def test_memory_that_others_map_cannot_be_written() -> None:
    async with node() as memory:
        await make(await client(memory), [])
        tier = await client(memory)
        found = await asyncio.to_thread(tier.lease, "weights")
        assert found is not None
        descriptor, num_bytes = found
        for write in (
            lambda: mmap.mmap(descriptor, num_bytes),
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 0),
        ):
            with pytest.raises(PermissionError):
                write()
        os.close(descriptor)
        private = (await make(await client(memory), []))[0]
        private.fill_(7)
        assert (await make(await client(memory), []))[0].tolist() == [10] * 10


async def test_leases_end_with_their_connection_and_idle_memory_is_kept_within_the_budget() -> None:
    async with node(budget_bytes=30_000) as memory:
        tier = await client(memory)
        await make(tier, [])
        tier.close()
        await until_idle(memory, 1)
        calls: list[int] = []
        again = await client(memory)
        await make(again, calls)
        assert calls == []
        again.close()
        await until_idle(memory, 1)
    async with node(budget_bytes=1000) as memory:
        tier = await client(memory)
        await make(tier, [])
        assert len((await memory.snapshot()).objects) == 1
        tier.close()
        await until_idle(memory, 0)
        assert (await memory.snapshot()).evictions_total == 1


async def until_idle(memory: HostMemoryNode, num_objects: int) -> None:
    async with asyncio.timeout(30):
        while True:
            objects = (await memory.snapshot()).objects
            if len(objects) == num_objects and not any(it.num_leases for it in objects):
                return
            await asyncio.sleep(0.01)


def noisy(tensor: torch.Tensor) -> None:
    """Weights as trained ones are: exponents of few kinds, random mantissas."""
    draw = torch.Generator().manual_seed(1)
    tensor.copy_(torch.randn(2 * len(tensor), generator=draw).mul(0.02).bfloat16().view(torch.int32))


async def make_noisy(tier: TierClient, num_elements: int, calls: list[int]) -> torch.Tensor:
    def fill(tensor: torch.Tensor) -> None:
        calls.append(1)
        time.sleep(0.5)  # what is quickly made again is not worth packing
        noisy(tensor)

    def work() -> torch.Tensor:
        arena = SharedArena(tier, "noisy", "BF16", 64 * MIB, SystemClock())
        try:
            made = arena.take(num_elements, torch.int32, fill)
            arena.publish()
            return made
        finally:
            arena.close()

    return await asyncio.to_thread(work)


async def test_what_is_idle_beyond_the_budget_is_packed_and_comes_back_to_the_bit() -> None:
    pytest.importorskip("xxhash")
    num_elements = 3 * MIB + 1000
    async with node(budget_bytes=10 * MIB) as memory:
        tier, calls = await client(memory), []
        expected = (await make_noisy(tier, num_elements, calls)).clone()
        assert len((await memory.snapshot()).objects) == 1
        tier.close()
        await until_packed(memory)
        [packed] = (await memory.snapshot()).objects
        assert 0.6 < packed.kept_bytes / packed.num_bytes < 0.75
        assert any("planes" in reason for reason in packed.reasons)
        holders = [await client(memory) for _ in range(3)]
        for found in await asyncio.gather(*(make_noisy(holder, num_elements, calls) for holder in holders)):
            assert torch.equal(found, expected)
        assert calls == [1]
        snapshot = await memory.snapshot()
        assert (snapshot.packs_total, snapshot.unpacks_total) == (1, 1)
        for holder in holders:
            holder.close()
        await until_packed(memory)


async def until_packed(memory: HostMemoryNode) -> None:
    async with asyncio.timeout(60):
        while not all(it.is_packed for it in (await memory.snapshot()).objects):
            await asyncio.sleep(0.01)


async def test_a_holder_that_leaves_while_its_object_is_unpacked_leaves_no_lease() -> None:
    pytest.importorskip("xxhash")
    async with node(budget_bytes=10 * MIB) as memory:
        tier = await client(memory)
        await make_noisy(tier, 3 * MIB, [])
        tier.close()
        await until_packed(memory)
        for _ in range(3):
            impatient = await memory.connect()
            for _ in range(3):
                impatient.send(msgspec.msgpack.encode(Lease("noisy")))
            impatient.close()
            await until_packed(memory)
            async with asyncio.timeout(60):
                while any(it.num_leases for it in (await memory.snapshot()).objects):
                    await asyncio.sleep(0.01)
        assert (await make_noisy(await client(memory), 3 * MIB, [])).numel() == 3 * MIB


async def test_an_object_laid_out_in_another_way_is_not_used() -> None:
    async with node() as memory:
        await make(await client(memory), [])
        for sizes in ((10,), (10, 5000, 1), (10, 50_000)):
            with pytest.raises(ArenaMismatch):
                await make(await client(memory), [], sizes)


async def test_without_its_node_an_engine_works_alone() -> None:
    async with node() as memory:
        tier = await client(memory)
        before = await make(tier, [])
        await memory.close()
        calls: list[int] = []
        after = await make(tier, calls)
        assert calls == [10, 5000]
        assert torch.equal(before[1], after[1])
        await make(await client(memory), calls)
        assert len((await memory.snapshot()).objects) == 1


A_FULL_NODE = """
from rekindle.protocol.tiers import Publish
from rekindle.store import node

class FullTier(node.MemoryTier):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        for number in range({num_objects}):
            self.publish(Publish(f"{{number:064x}}", number, "BF16", 1.0), -1)

node.MemoryTier = FullTier
node.main()
"""


async def test_a_snapshot_of_twenty_thousand_objects_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    full = A_FULL_NODE.format(num_objects=20_000)
    monkeypatch.setattr("rekindle.fleet.host_memory._COMMAND", (sys.executable, "-c", full))
    num_open = len(os.listdir("/proc/self/fd"))
    async with node() as memory:
        await client(memory)
        for _ in range(2):
            snapshot = await memory.snapshot()
            assert [it.num_bytes for it in snapshot.objects] == list(range(20_000))
            assert len({it.name for it in snapshot.objects}) == 20_000
    assert len(os.listdir("/proc/self/fd")) == num_open


async def test_a_node_keeps_more_objects_than_a_process_may_usually_open_files() -> None:
    usual, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(usual, 256), most))
    try:
        async with node() as memory:
            tier = await client(memory)
            with new_file(4096) as file:
                kept = [tier.publish(Publish(str(number), 4096, "BF16", 1.0), file.descriptor) for number in range(300)]
            assert kept == [True] * 300
            assert len((await memory.snapshot()).objects) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (usual, most))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_node_that_does_not_answer_is_shown_as_empty_and_replaced(
    how: signal.Signals, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rekindle.fleet.host_memory._ANSWER_S", 0.1)
    async with node() as memory:
        await make(await client(memory), [])
        assert memory._helper is not None
        os.kill(memory._helper._process.pid, how)
        assert (await memory.snapshot()).objects == ()
        assert "what is in host memory cannot be told: the host-memory tier" in caplog.text
        await make(await client(memory), [])
        monkeypatch.undo()
        assert len((await memory.snapshot()).objects) == 1


async def test_who_asks_what_is_in_memory_and_leaves_spoils_no_other_answer() -> None:
    async with node() as memory:
        await client(memory)
        impatient = asyncio.create_task(memory.snapshot())
        await asyncio.sleep(0)
        impatient.cancel()
        await make(await client(memory), [])
        assert len((await memory.snapshot()).objects) == 1


async def test_a_holder_that_speaks_out_of_turn_loses_its_connection_and_nobody_else_does() -> None:
    async with node() as memory:
        tier = await client(memory)
        await make(tier, [])
        for message in (
            b"\xff\xff",
            msgspec.msgpack.encode(Attach()),
            b"\x81",
            msgspec.msgpack.encode({"type": "Publish"}),
        ):
            bad = await memory.connect()
            bad.send(message)
            bad.settimeout(30)
            assert await asyncio.to_thread(bad.recv, 100) == b""
            bad.close()
        asking = await memory.connect()
        asking.settimeout(30)
        asking.send(msgspec.msgpack.encode(AskSnapshot()))
        assert await asyncio.to_thread(asking.recv, 4096)
        asking.close()
        found = await asyncio.to_thread(tier.lease, "weights")
        assert found is not None
        os.close(found[0])


async def test_engines_of_one_model_share_its_weights_and_wake_without_laying_them_out(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    make_model("llama", tmp_path / "source")
    home = Home(tmp_path / "home")
    manifest = import_model(tmp_path / "source", home)
    directory = str(home.model_directory(manifest.digest))
    settings = engine_settings(model=manifest, model_dir=directory, memory_bytes=8 * MIB, dtype="bfloat16")
    if not await _lays_out(settings):
        pytest.skip("these kernels leave weights as they are stored")
    async with node() as memory:
        launcher = TemplateLauncher(node=memory)
        sleepy = replace(QUICK, keep_alive_s=0.05)
        replicas = [
            Replica(settings, SystemClock(), supervision=supervision, launcher=launcher)
            for supervision in (QUICK, sleepy)
        ]
        try:
            for replica in replicas:
                await replica.start()
            wanted = request("r", 20, (3, 4, 5), temperature=0.0)
            one, other = [tokens_of(await collect(replica, wanted)) for replica in replicas]
            assert one == other
            await until(lambda: replicas[1].engine_pid is None, "sleep")
            os.kill(replicas[0].engine_pid or 0, signal.SIGKILL)
            await until(lambda: replicas[0].restarts_total == 1 and replicas[0].is_ready, "another engine")
            assert tokens_of(await collect(replicas[0], wanted)) == one
            assert tokens_of(await collect(replicas[1], wanted)) == one
            snapshot = await memory.snapshot()
            assert len(snapshot.objects) == 1
            assert snapshot.misses_total == 1
            assert snapshot.hits_total >= 3
        finally:
            for replica in replicas:
                await replica.stop()
            await launcher.close()


async def _lays_out(settings: EngineSettings) -> bool:
    from rekindle.engine.engine import Engine

    def work() -> bool:
        engine = Engine(settings, SystemClock(), lambda: None)
        try:
            return engine._runner._model.kernels.layout is not None
        finally:
            engine.close()

    return await asyncio.to_thread(work)
