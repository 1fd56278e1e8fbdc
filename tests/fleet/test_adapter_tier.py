"""Adapters in host memory: what engines let go of is kept and comes back, through real processes and files."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.tiers import Hold, Publish, Resident, Snapshot
from rekindle.store.adapter_import import import_adapter
from rekindle.store.anonymous_file import new_file
from rekindle.store.checksums import write_checked_tensors
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.store.safetensors_file import TensorStream
from rekindle.store.tier_client import Copy, TierClient
from rekindle.store.vector_sources import MemorySource, PackedSource
from rekindle.units import MIB
from support.engines import LocalEngine, greedy
from support.nodes import Node, client, node
from support.tiny import make_adapter, make_model

pytest.importorskip("peft")

PROMPT = [3, 4, 5, 6, 7]


def stored(path: Path, num_bytes: int, seed: int = 1) -> bytes:
    """Write a file as the store does; returns the vector, which looks like trained weights."""
    values = np.random.default_rng(seed).normal(0, 0.02, num_bytes // 2).astype(np.float32)
    vector = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    streams = [TensorStream("a", "BF16", (num_bytes // 2,), lambda: [vector])]
    write_checked_tensors(path, streams, observe=lambda piece: None)
    return vector


def held(path: Path, num_bytes: int, made_s: float = 10.0) -> Hold:
    return Hold(path.stem, num_bytes, "BF16", made_s, str(path))


def bytes_of(copy: Copy, num_bytes: int) -> bytes:
    out = bytearray(num_bytes)
    kind = PackedSource if copy.is_packed else MemorySource
    kind(copy.descriptor, copy.num_bytes).read([memoryview(out)])
    return bytes(out)


def only(snapshot: Snapshot) -> Resident:
    (resident,) = snapshot.objects
    return resident


async def test_an_adapter_that_its_last_holder_lets_go_of_is_read_packed_and_had_back_to_the_bit(
    tmp_path: Path,
) -> None:
    vector = stored(path := tmp_path / "a", 3 * MIB)
    async with node(budget_bytes=5 * MIB // 2) as memory:
        tiers = [await client(memory) for _ in range(2)]
        for tier in tiers:
            tier.hold(held(path, 3 * MIB))
        tiers[0].release("a")
        resident = only(await memory.until(lambda it: sum(one.num_leases for one in it.objects) == 1))
        assert (resident.kept_bytes, resident.is_elsewhere) == (0, True)
        tiers[1].close()
        snapshot = await memory.until(lambda it: it.packs_total == 1)
        assert 0.6 < only(snapshot).kept_bytes / (3 * MIB) < 0.75
        assert snapshot.reads_total == 1
        tier = await client(memory)
        copy = await asyncio.to_thread(tier.lease_copy, "a")
        assert copy is not None
        assert copy.is_packed
        assert bytes_of(copy, 3 * MIB) == vector


async def test_what_its_file_gives_as_fast_is_not_packed_and_says_why(tmp_path: Path) -> None:
    vector = stored(path := tmp_path / "a", 3 * MIB)
    async with node(budget_bytes=5 * MIB) as memory:
        tier = await client(memory)
        stored(tmp_path / "b", 3 * MIB, seed=2)
        for name in ("a", "b"):
            tier.hold(held(tmp_path / name, 3 * MIB, made_s=1e-6))
            tier.release(name)
        snapshot = await memory.until(lambda it: bool(it.evictions_total))
        assert snapshot.packs_total == 0
        copy = await asyncio.to_thread(tier.lease_copy, "a")
        if copy is not None:
            assert not copy.is_packed
            assert bytes_of(copy, 3 * MIB) == vector
        assert path.exists()


async def test_a_damaged_a_missing_and_a_shorter_file_are_not_kept_and_harm_nothing(tmp_path: Path) -> None:
    good = stored(tmp_path / "good", MIB)
    async with node() as memory:
        tier = await client(memory)
        for name in ("flipped", "short", "missing"):
            stored(path := tmp_path / name, MIB)
            content = bytearray(path.read_bytes())
            content[-7] ^= 1
            path.write_bytes(content if name == "flipped" else content[:-9])
            if name == "missing":
                path.unlink()
            tier.hold(held(path, MIB))
            tier.release(name)
        tier.hold(held(tmp_path / "good", MIB))
        tier.release("good")
        await memory.until(lambda it: [one.name for one in it.objects] == ["good"] and it.reads_total == 1)
        copy = await asyncio.to_thread(tier.lease_copy, "good")
        assert copy is not None
        assert bytes_of(copy, MIB) == good


async def test_a_file_that_does_not_come_delays_no_other_object(tmp_path: Path) -> None:
    os.mkfifo(stuck := tmp_path / "stuck")
    async with node() as memory:
        tier = await client(memory)
        with new_file(MIB) as file:
            descriptor = file.finish()
        tier.publish(Publish("weights", MIB, "BF16", 10.0), descriptor)
        os.close(descriptor)
        tier.hold(held(stuck, MIB))
        tier.release("stuck")
        await memory.until(lambda it: any(one.name == "stuck" and not one.num_leases for one in it.objects))
        found = await asyncio.to_thread((await client(memory)).lease, "weights")
        assert found is not None
        os.close(found[0])
        assert await asyncio.to_thread(tier.lease_copy, "stuck") is None


async def test_a_holder_gives_back_no_more_than_it_has(tmp_path: Path) -> None:
    stored(path := tmp_path / "a", MIB)
    async with node() as memory:
        one, other = await client(memory), await client(memory)
        one.hold(held(path, MIB))
        await memory.until(lambda it: bool(it.objects))
        other.release("a")
        assert await asyncio.to_thread(other.lease, "a") is None, "its connection has ended"
        assert only(await memory.snapshot()).num_leases == 1


async def test_a_thousand_adapters_come_and_go_without_anything_growing(tmp_path: Path) -> None:
    num_bytes = 64 << 10
    paths = [tmp_path / f"a{i}" for i in range(1000)]
    for i, path in enumerate(paths):
        stored(path, num_bytes, seed=i)

    async def churn(tier: TierClient, some: Sequence[Path]) -> None:
        for path in some:
            copy = await asyncio.to_thread(tier.lease_copy, path.stem)
            if copy is not None:
                os.close(copy.descriptor)
            tier.hold(held(path, num_bytes))
            if copy is not None:
                tier.release(path.stem)
            tier.release(path.stem)

    async with node(budget_bytes=2 * MIB) as memory:
        tier = await client(memory)
        await churn(tier, paths[:300])
        before = await settled(memory)
        await churn(tier, paths[300:])
        await churn(tier, paths[:300])
        after = await settled(memory)
        snapshot = await memory.snapshot()
        assert snapshot.idle_bytes <= 2 * MIB
        assert len(snapshot.objects) <= 2 * 2 * MIB // num_bytes
        assert after.num_descriptors <= before.num_descriptors + 16
        assert after.num_threads <= before.num_threads + 1
        assert after.resident_bytes <= before.resident_bytes + 8 * MIB


@dataclass(frozen=True)
class Usage:
    num_descriptors: int
    num_threads: int
    resident_bytes: int


async def settled(memory: Node) -> Usage:
    """What the process uses when it has nothing to do any more."""

    def is_done(snapshot: Snapshot) -> bool:
        return all(it.kept_bytes for it in snapshot.objects) and snapshot.idle_bytes <= snapshot.budget_bytes

    await memory.until(is_done)
    process = Path(f"/proc/{memory.pid}")
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Usage(
        len(list((process / "fd").iterdir())), int(status["Threads"]), int(status["RssAnon"].split()[0]) * 1024
    )


@dataclass
class Served:
    """A tiny base, adapters of it, and what each says."""

    model_dir: Path
    engine_settings: dict[str, Any]
    adapters: dict[str, tuple[Path, AdapterManifest]]
    expected: dict[str, list[int]]

    def engine(self, tier: TierClient | None) -> LocalEngine:
        engine = LocalEngine(self.model_dir, self.engine_settings["manifest"], tier=tier)
        for directory, manifest in self.adapters.values():
            engine.add_adapter(directory, manifest)
        return engine

    def say(self, engine: LocalEngine) -> dict[str, list[int]]:
        requests = [greedy(name, PROMPT, 6, manifest.digest) for name, (_, manifest) in self.adapters.items()]
        return {name: output.token_ids for name, output in engine.run(requests).items() if name in self.adapters}

    @property
    def num_bytes(self) -> int:
        return sum(4 * manifest.num_elements for _, manifest in self.adapters.values())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory = tmp_path_factory.mktemp("tier")
    base = make_model("llama", directory / "source")
    home = Home(directory / "home")
    manifest = import_model(directory / "source", home)
    model_dir = home.model_directory(manifest.digest)
    adapters = {}
    for seed, rank in enumerate((4, 8, 16)):
        make_adapter(base, directory / f"{rank}", seed, r=rank, target_modules="all-linear")
        made = import_adapter(directory / f"{rank}", manifest, model_dir, home)
        adapters[f"rank-{rank}"] = (home.adapter_directory(made.digest), made)
    served = Served(model_dir, {"manifest": manifest}, adapters, {})
    engine = served.engine(None)
    served.expected = served.say(engine)
    engine.engine.close()
    assert len({tuple(said) for said in served.expected.values()}) == 3
    return served


def worth_packing(served: Served, tier: TierClient) -> None:
    """Tell host memory beforehand that files are slow; it believes the first who says so."""
    for directory, manifest in served.adapters.values():
        path = directory / "adapter.safetensors"
        tier.hold(Hold(f"adapter/{manifest.digest}", 4 * manifest.num_elements, manifest.dtype, 10.0, str(path)))


@pytest.mark.parametrize("is_killed", [False, True])
async def test_the_next_engine_has_the_adapters_of_the_last_from_packed_memory(served: Served, is_killed: bool) -> None:
    async with node(budget_bytes=int(0.95 * served.num_bytes)) as memory:
        if is_killed:
            told = await client(memory)
            worth_packing(served, told)
        first = await client(memory)
        if not is_killed:
            worth_packing(served, first)
        engine = served.engine(first)
        assert await asyncio.to_thread(served.say, engine) == served.expected
        assert all(not it.kept_bytes for it in (await memory.snapshot()).objects)
        if is_killed:
            first.close()  # what its end looks like from here
            told.close()
        engine.engine.close()
        first.close()
        snapshot = await memory.until(lambda it: it.reads_total == 3 and it.idle_bytes <= it.budget_bytes)
        assert len(snapshot.objects) == 3
        assert snapshot.packs_total >= 1
        again = served.engine(await client(memory))
        assert await asyncio.to_thread(served.say, again) == served.expected
        after = await memory.snapshot()
        assert after.hits_total - snapshot.hits_total == 3
        assert after.reads_total == 3
        again.engine.close()


async def test_an_engine_goes_on_from_files_when_host_memory_dies(served: Served) -> None:
    async with node() as memory:
        engine = served.engine(await client(memory))
        assert await asyncio.to_thread(served.say, engine) == served.expected
        os.kill(memory.pid, signal.SIGKILL)
        for _, manifest in served.adapters.values():
            engine.engine.remove_adapter(manifest.digest)
        for directory, manifest in served.adapters.values():
            engine.add_adapter(directory, manifest)
        assert await asyncio.to_thread(served.say, engine) == served.expected
        engine.engine.close()


class Damaged(TierClient):
    """Gives copies with one bit changed if they are packed, and short ones if not."""

    num_packed = 0

    def lease_copy(self, name: str, *, takes_packed: bool = True) -> Copy | None:
        copy = super().lease_copy(name, takes_packed=takes_packed)
        if copy is None:
            return None
        content = bytearray(os.pread(copy.descriptor, copy.num_bytes, 0))
        os.close(copy.descriptor)
        if copy.is_packed:
            self.num_packed += 1
            content[-2] ^= 1
        else:
            del content[4096:]
        with new_file(len(content)) as file:
            os.pwrite(file.descriptor, content, 0)
            return Copy(file.finish(), len(content), copy.is_packed)


async def test_damaged_memory_is_dropped_and_the_file_read_instead(served: Served) -> None:
    async with node(budget_bytes=int(0.95 * served.num_bytes)) as memory:
        worth_packing(served, tier := await client(memory))
        tier.close()
        await memory.until(lambda it: it.reads_total == 3 and it.idle_bytes <= it.budget_bytes)
        damaged = Damaged(await memory.connect())
        memory.clients.append(damaged)
        engine = served.engine(damaged)
        assert await asyncio.to_thread(served.say, engine) == served.expected
        assert damaged.num_packed >= 1
        snapshot = await memory.snapshot()
        assert [it.kept_bytes for it in snapshot.objects] == [0, 0, 0]
        engine.engine.close()


async def test_host_memory_killed_while_it_reads_and_packs_leaves_engines_and_files_as_they_were(
    served: Served, tmp_path: Path
) -> None:
    for delay_s in (0.0, 0.02, 0.05, 0.1):
        vector = stored(path := tmp_path / f"large-{delay_s}", 8 * MIB)
        async with node(budget_bytes=6 * MIB) as memory:
            tier = await client(memory)
            engine = served.engine(tier)
            tier.hold(held(path, 8 * MIB))
            tier.release(path.stem)
            await asyncio.sleep(delay_s)  # in the midst of whatever it is at then
            os.kill(memory.pid, signal.SIGKILL)
            assert await asyncio.to_thread(served.say, engine) == served.expected
            engine.engine.close()
            assert path.read_bytes()[-len(vector) :] == vector
            fresh = await client(memory)
            assert await asyncio.to_thread(fresh.lease_copy, path.stem) is None
