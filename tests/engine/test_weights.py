"""Weights from the page cache and past it: the same to the bit, verified either way, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from rekindle.clock import SystemClock
from rekindle.engine import weight_reading, weights
from rekindle.engine.arena import OWN_ARENA, Arena, Tier
from rekindle.engine.engine import _decoder
from rekindle.engine.kernels.interface import Rows
from rekindle.engine.kernels.linear import PlainLinear
from rekindle.engine.kernels.reference import ReferenceKernels
from rekindle.engine.models.decoder import LINEARS, Decoder
from rekindle.engine.models.registry import read_architecture, read_config
from rekindle.engine.weights import Weights
from rekindle.errors import ModelRejected, StoredFileDamaged
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.protocol.tiers import Publish
from rekindle.store import checksums
from rekindle.store.checksums import checksums_path, write_checked_tensors
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.store.model_layout import tensor_shapes
from rekindle.store.safetensors_file import TensorStream, read_header
from support.devices import OwnWeights
from support.engines import LocalEngine, greedy
from support.tiny import CONFIGS, make_model

CHUNK = 1 << 14
PAST_CACHE = StorageProfile(1 << 12, 3, direct_bytes_s=2e9, cached_bytes_s=1e9)
"""Of a disk that is quicker than copying, so that everything streams."""
assert not PAST_CACHE.prefers_cache

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (301, 64),
    "norm": (64,),
    "q": (96, 64),
    "k": (33, 64),
    "v": (33, 64),
    "q.bias": (96,),
    "k.bias": (33,),
    "v.bias": (33,),
    "scalar": (),
    "empty": (0, 64),
    "empty.bias": (0,),
    "wide": (7, 20_001),
    "cube": (5, 6, 7),
    "down": (64, 999),
    "last.norm": (1000,),
}
"""More than a ring holds, most of it not aligned to anything."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums.ChecksumBuilder.__init__, "__defaults__", (CHUNK,))
    monkeypatch.setattr(weight_reading, "_RING_BYTES", 4 * CHUNK)


def write(path: Path, dtype: str = "BF16") -> Path:
    size = {"BF16": 2, "F16": 2, "F32": 4}[dtype]
    rng = np.random.default_rng(0)
    streams = []
    for name, shape in SHAPES.items():
        values = torch.from_numpy(rng.standard_normal(shape, np.float32).reshape(shape))
        stored = values.to({"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype])
        raw = stored.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if prod(shape) else b""
        assert len(raw) == prod(shape) * size
        streams.append(TensorStream(name, dtype, shape, [raw].copy))
    write_checked_tensors(path, streams, metadata={"padding": "x" * 5000}, observe=lambda _: None)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors")


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.equal(right)


def take(source: Weights, names: Sequence[str], multiple: int | None) -> torch.Tensor:
    rows = source.rows(names)
    if multiple is None:
        return rows.whole()
    blocks = [block.clone() for block in rows.blocks(multiple)]
    assert all(len(block) % multiple == 0 for block in blocks[:-1])
    return torch.cat(blocks).view(rows.shape) if blocks else torch.empty(rows.shape, dtype=rows.dtype)


Take = tuple[tuple[str, ...], int | None]
"""What is taken at once, and in blocks of which multiple; None as a whole."""

IN_ORDER: list[Take] = [
    (("embed",), None), (("q", "k", "v"), 16), (("q.bias", "k.bias", "v.bias"), None), (("norm",), None),
    (("wide",), 1), (("cube",), 2), (("down",), 16), (("scalar",), None), (("empty",), 4), (("empty.bias",), None),
    (("last.norm",), None),
]  # fmt: skip
ORDERS: dict[str, list[Take]] = {
    "in order": IN_ORDER,
    "backwards": IN_ORDER[::-1],
    "whole": [(names, None) for names, _ in IN_ORDER],
    "blocks of one": [(names, 1) for names, _ in IN_ORDER if SHAPES[names[0]]],
    "tied": [(("embed",), 16), *IN_ORDER[1:], (("embed",), 16), (("embed",), None)],
    "vectors first": sorted(IN_ORDER, key=lambda take: len(SHAPES[take[0][0]])),
    "not adjacent": [(("v", "k", "q"), 16), (("k", "embed"), None), (("down",), 64)],
    "the end alone": [(("down",), 3), (("norm",), None)],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stored", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [Weights, OwnWeights])
def test_streamed_weights_are_the_mapped_ones(
    tmp_path: Path, order: str, stored: str, dtype: torch.dtype, kind: type[Weights]
) -> None:
    path = write(tmp_path / "model.safetensors", stored)
    mapped = Weights(path, dtype, SHAPES)
    evict(path)
    streamed = kind(path, dtype, SHAPES, profile=PAST_CACHE)
    with streamed.reading():
        for names, multiple in ORDERS[order]:
            expected = mapped.rows(names).whole()
            taken = take(streamed, names, multiple)
            assert same(taken, expected), names
            assert streamed.rows(names).shape == tuple(expected.shape)
    for names, _ in ORDERS[order]:
        if SHAPES[names[0]]:
            target = torch.empty_like(mapped.rows(names).whole())
            streamed.write(names, target)
            assert same(target, mapped.rows(names).whole())


def test_what_is_used_in_place_is_a_view_of_the_file(path: Path) -> None:
    source = Weights(path, torch.bfloat16, SHAPES, profile=PAST_CACHE)
    with source.reading():
        embed, fused = source.tensor("embed"), source.rows(["q", "k", "v"]).whole()
    for name, offset in (("q", 0), ("k", 96), ("v", 129)):
        assert fused[offset:].data_ptr() == source.tensor(name).data_ptr()
    assert embed.data_ptr() == source.tensor("embed").data_ptr()


def take_all(source: Weights) -> None:
    for names, multiple in IN_ORDER:
        take(source, names, multiple)


PROFILES = pytest.mark.parametrize("profile", [DEFAULT_PROFILE, PAST_CACHE])


@PROFILES
@pytest.mark.parametrize("name", ["embed", "k", "wide", "last.norm", "v.bias"])
@pytest.mark.parametrize("kind", [Weights, OwnWeights])
def test_a_flipped_bit_in_anything_that_is_taken_is_found_and_named(
    path: Path, profile: StorageProfile, name: str, kind: type[Weights]
) -> None:
    entry = read_header(path).entries[name]
    at = entry.offset + entry.num_bytes // 2
    flip(path, at)
    evict(path)
    begin = at - at % CHUNK
    source = kind(path, torch.bfloat16, SHAPES, profile=profile)
    expected = f"{re.escape(str(path))} is damaged: its bytes {begin} to .* import it again"
    with pytest.raises(StoredFileDamaged, match=expected), source.reading():
        take_all(source)


@PROFILES
def test_a_torn_file_a_damaged_index_and_one_of_another_file_are_refused(path: Path, profile: StorageProfile) -> None:
    source = Weights(path, torch.bfloat16, SHAPES, profile=profile)
    index = checksums_path(path)
    whole = index.read_bytes()
    other = path.with_name("other.safetensors")
    write_checked_tensors(
        other, [TensorStream("a", "BF16", (5,), [bytes(10)].copy)], metadata={}, observe=lambda _: None
    )
    for content, message in (
        (whole[:-3], "is damaged: it has"),
        (whole[:50] + b"!" + whole[51:], "its own checksum does not match"),
        (checksums_path(other).read_bytes(), "its checksums are of"),
    ):
        index.write_bytes(content)
        expected = f"{re.escape(str(path))}.*{message}.*import it again"
        with pytest.raises(StoredFileDamaged, match=expected), source.reading():
            pytest.fail("reading began")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelRejected, match=f"{re.escape(str(path))} cannot be used.*import it again"):
        Weights(path, torch.bfloat16, SHAPES, profile=profile)


@PROFILES
def test_files_of_older_imports_without_an_index_are_read_unverified(path: Path, profile: StorageProfile) -> None:
    checksums_path(path).unlink()
    flip(path, read_header(path).entries["k"].offset)
    evict(path)
    mapped, source = Weights(path, torch.bfloat16, SHAPES), Weights(path, torch.bfloat16, SHAPES, profile=profile)
    with source.reading():
        for names, multiple in IN_ORDER:
            taken = take(source, names, multiple)
            assert same(taken, mapped.rows(names).whole())


def held() -> tuple[int, int]:
    gc.collect()  # other tests' mappings hold descriptors
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@PROFILES
def test_a_start_that_is_broken_off_leaves_no_threads_and_descriptors(path: Path, profile: StorageProfile) -> None:
    before = held()
    for num_taken in range(len(IN_ORDER)):
        evict(path)
        source = Weights(path, torch.bfloat16, SHAPES, profile=profile)
        with pytest.raises(KeyboardInterrupt), source.reading():
            for names, multiple in IN_ORDER[:num_taken]:
                take(source, names, multiple)
            raise KeyboardInterrupt
        del source
    assert held()[1] == before[1]
    assert held()[0] == before[0]


def test_the_page_cache_is_used_where_it_has_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.read_bytes()
    monkeypatch.setattr(weight_reading, "FileStream", lambda *_, **__: pytest.fail("it was streamed"))
    source = Weights(path, torch.bfloat16, SHAPES)
    with source.reading():
        take_all(source)


class Blockwise(ReferenceKernels):
    layout = "as stored"

    def pack_linear(self, weight_NK: Rows, bias_N: Rows | None, arena: Arena = OWN_ARENA) -> PlainLinear:
        def fill(packed: torch.Tensor) -> None:
            packed.copy_(torch.cat([block_NK.flatten() for block_NK in weight_NK.blocks(16)]))

        packed_NK = arena.take(prod(weight_NK.shape), weight_NK.dtype, fill).view(weight_NK.shape)
        return PlainLinear(packed_NK, None if bias_N is None else bias_N.whole())


class OneObject:
    """The host-memory tier, as far as one engine's weights are concerned."""

    def __init__(self) -> None:
        self.kept: tuple[int, int] | None = None

    def lease(self, name: str) -> tuple[int, int] | None:
        return None if self.kept is None else (os.dup(self.kept[0]), self.kept[1])

    def publish(self, made: Publish, descriptor: int) -> bool:
        self.kept = os.dup(descriptor), made.num_bytes
        return True


class Served:
    def __init__(self, name: str, directory: Path) -> None:
        make_model(name, directory / "source")
        home = Home(directory / "home")
        self.manifest = import_model(directory / "source", home)
        self.directory = home.model_directory(self.manifest.digest)
        self.file = self.directory / "model.safetensors"

    def logprobs(self, **changes: object) -> list[float]:
        """Of one continuation, as this model's engine gives them."""
        engine = LocalEngine(self.directory, self.manifest, **changes)  # type: ignore[arg-type]
        try:
            output = engine.run([greedy("a", range(3, 40), 12, logprobs=5)])["a"]
        finally:
            engine.close()
        return [value for step in output.logprobs for _, value in step.top]

    def decoder(self, profile: StorageProfile, tier: Tier | None = None) -> Decoder:
        """Of an engine whose kernels lay weights out in blocks, on any processor."""
        config = read_config(self.directory)
        settings = EngineSettings(str(self.directory), self.manifest, "bfloat16", 0, 16, 64, 32, 256, 1)
        weights = Weights(self.file, torch.bfloat16, tensor_shapes(config), profile=profile)
        return _decoder(settings, read_architecture(config), weights, Blockwise(), SystemClock(), None, tier)


@pytest.fixture(params=sorted(CONFIGS))
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Served:
    return Served(request.param, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_engines_of_every_family_say_the_same_from_the_disk_as_from_the_page_cache(served: Served, dtype: str) -> None:
    served.file.read_bytes()
    warm = served.logprobs(dtype=dtype)
    evict(served.file)
    assert warm == served.logprobs(dtype=dtype, storage=PAST_CACHE)


def linears(model: Decoder) -> list[torch.Tensor]:
    layers = [getattr(layer, name) for layer in model.weights.layers for name in LINEARS]
    return [linear.weight_NK for linear in (*layers, model.weights.head)]


def test_a_model_takes_all_but_its_embedding_from_the_stream(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and biases lie between the matrices and are put aside until they are asked for: nothing is read twice."""
    from_map: list[tuple[int, int]] = []
    monkeypatch.setattr(weight_reading.WeightReading, "add_mapped", lambda _, begin, end: from_map.append((begin, end)))
    entries = read_header(served.file).entries
    evict(served.file)
    served.decoder(PAST_CACHE)
    first_norm = "model.layers.0.input_layernorm.weight"  # the stream begins behind it, or with its chunk
    allowed = [entries[name] for name in ("model.embed_tokens.weight", first_norm)]
    assert {begin for begin, _ in from_map} <= {entry.offset for entry in allowed}


@PROFILES
def test_damaged_weights_are_never_shared_and_what_was_shared_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: StorageProfile
) -> None:
    served, tier = Served("llama", tmp_path), OneObject()
    at = read_header(served.file).entries["model.layers.1.mlp.up_proj.weight"].offset
    flip(served.file, at)
    with pytest.raises(StoredFileDamaged):
        served.decoder(profile, tier)
    assert tier.kept is None
    flip(served.file, at)
    made = linears(served.decoder(profile, tier))
    assert tier.kept is not None
    flip(served.file, at)
    monkeypatch.setattr(weights, "WeightReading", lambda *_: pytest.fail("the file was read"))
    found = linears(served.decoder(profile, tier))
    assert all(same(left, right) for left, right in zip(made, found, strict=True))


def test_an_engine_does_not_start_on_damaged_weights(tmp_path: Path) -> None:
    served = Served("qwen2", tmp_path)
    flip(served.file, read_header(served.file).entries["model.layers.0.self_attn.k_proj.bias"].offset)
    before = held()
    for storage in (DEFAULT_PROFILE, PAST_CACHE):
        with pytest.raises(StoredFileDamaged, match="import it again"):
            served.logprobs(storage=storage)
    assert held() == before


MEASURED = """
import resource, sys, torch
from pathlib import Path
from rekindle.engine.weights import Weights
from rekindle.protocol.storage import StorageProfile
names = [f"m{i}" for i in range(40)]
source = Weights(
    Path(sys.argv[1]), torch.bfloat16, {name: (1792, 2048) for name in names}, profile=StorageProfile(1 << 20, 4)
)
num_bytes, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with source.reading():
    for name in names:
        for block in source.rows([name]).blocks(16):
            num_bytes += block.nbytes
print(num_bytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    path, matrix = tmp_path / "model.safetensors", os.urandom(1792 * 2048 * 2)
    streams = [TensorStream(f"m{i}", "BF16", (1792, 2048), [matrix].copy) for i in range(40)]
    write_checked_tensors(path, streams, observe=lambda _: None)
    evict(path)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True)
    num_bytes, grown = map(int, done.stdout.split())
    assert num_bytes == 40 * len(matrix)
    assert grown < 64 << 20
