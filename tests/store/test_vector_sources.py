"""Adapters' vectors on their way to a device: the same bytes from a file and from memory, or an error."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rekindle.errors import AdapterRejected, PackedDamaged, StoredFileDamaged
from rekindle.store.anonymous_file import new_file
from rekindle.store.checksums import CHUNK_BYTES, checksums_path, write_checked_tensors
from rekindle.store.codecs.packed import pack_into, packed_bound
from rekindle.store.codecs.registry import codec_named
from rekindle.store.safetensors_file import TensorStream
from rekindle.store.vector_sources import FileSource, MemorySource, PackedSource, VectorSource
from rekindle.units import MIB

NUM_BYTES = CHUNK_BYTES + 3 * MIB + 1234


@pytest.fixture(scope="module")
def vector() -> bytes:
    """Elements as trained ones are: exponents of few kinds, random mantissas."""
    values = np.random.default_rng(1).normal(0, 0.02, NUM_BYTES // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


@pytest.fixture
def path(tmp_path: Path, vector: bytes) -> Path:
    stored = tmp_path / "adapter.safetensors"
    streams = [TensorStream("a", "BF16", (len(vector) // 2,), lambda: [vector])]
    write_checked_tensors(stored, streams, observe=lambda piece: None)
    return stored


def memory(content: bytes) -> int:
    with new_file(len(content)) as file:
        os.pwrite(file.descriptor, content, 0)
        return file.finish()


def packed(vector: bytes) -> bytes:
    out = bytearray(packed_bound(len(vector), MIB))
    return bytes(out[: pack_into(codec_named("planes-deflate/native"), vector, "BF16", out, frame_bytes=MIB)])


@pytest.fixture(params=["file", "memory", "packed", "packed, in threads"])
def source(request: pytest.FixtureRequest, path: Path, vector: bytes) -> Iterator[VectorSource]:
    match request.param:
        case "file":
            with FileSource(path, NUM_BYTES) as file:
                yield file
        case "memory":
            yield MemorySource(memory(vector), NUM_BYTES)
        case "packed":
            small = packed(vector)
            yield PackedSource(memory(small), len(small))
        case _:
            small = packed(vector)
            with ThreadPoolExecutor(2) as threads:
                yield PackedSource(memory(small), len(small), lambda: threads)


def cuts(seed: int) -> list[int]:
    """Lengths that make up a vector: whole frames, less, more, nothing."""
    chance = random.Random(seed)
    lengths = []
    while (left := NUM_BYTES - sum(lengths)) > 0:
        lengths.append(min(left, chance.choice([0, 1, 4096, 65537, 300_000, MIB - 5, MIB, 2 * MIB, 3 * MIB + 7])))
    return lengths


@pytest.mark.parametrize("seed", range(6))
def test_every_source_gives_the_same_bytes_into_whatever_pieces(source: VectorSource, vector: bytes, seed: int) -> None:
    assert source.num_bytes == NUM_BYTES
    whole = bytearray(NUM_BYTES)
    position, targets = 0, []
    for length in cuts(seed):
        targets.append(memoryview(whole)[position : position + length])
        position += length
    split = random.Random(seed).randrange(len(targets))
    source.read(targets[:split])
    source.read(targets[split:])
    assert whole == vector


def test_the_reader_rests_between_pieces(path: Path, vector: bytes) -> None:
    rests: list[str] = []
    small = packed(vector)
    with FileSource(path, NUM_BYTES, lambda: rests.append("file")) as file:
        file.read([memoryview(bytearray(NUM_BYTES))])
    MemorySource(memory(vector), NUM_BYTES, lambda: rests.append("memory")).read([memoryview(bytearray(NUM_BYTES))])
    PackedSource(memory(small), len(small), rest=lambda: rests.append("packed")).read(
        [memoryview(bytearray(NUM_BYTES))]
    )
    assert rests.count("file") >= NUM_BYTES // MIB
    assert rests.count("memory") >= NUM_BYTES // MIB
    assert rests.count("packed") == NUM_BYTES // MIB + 1


@pytest.mark.parametrize("position", [8, 4096, 4096 + CHUNK_BYTES, 4096 + NUM_BYTES - 1])
def test_a_flipped_bit_anywhere_in_the_file_is_an_error(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)
    with FileSource(path, NUM_BYTES) as file, pytest.raises(StoredFileDamaged, match=r"bytes \d+ to \d+ .*import it"):
        file.read([memoryview(bytearray(NUM_BYTES))])


def test_a_file_of_another_length_is_refused_before_it_is_read(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(4096 + NUM_BYTES - 1)
    with pytest.raises(AdapterRejected, match=f"holds {NUM_BYTES - 1} bytes of tensors, {NUM_BYTES} expected"):
        FileSource(path, NUM_BYTES)
    path.write_bytes(b"123")
    with pytest.raises(AdapterRejected, match="3 bytes"):
        FileSource(path, NUM_BYTES)


def test_a_file_without_checksums_is_read_unverified_and_one_with_damaged_ones_is_refused(
    path: Path, vector: bytes
) -> None:
    index = checksums_path(path)
    index.write_bytes(index.read_bytes()[:-8])
    with pytest.raises(StoredFileDamaged, match="its own checksum does not match"):
        FileSource(path, NUM_BYTES)
    index.unlink()
    out = bytearray(NUM_BYTES)
    with FileSource(path, NUM_BYTES) as file:
        file.read([memoryview(out)])
    assert out == vector


def test_a_flipped_bit_in_packed_memory_is_an_error(vector: bytes) -> None:
    small = bytearray(packed(vector))
    small[len(small) // 2] ^= 1
    source = PackedSource(memory(bytes(small)), len(small))
    with pytest.raises(PackedDamaged, match="does not match its checksum"):
        source.read([memoryview(bytearray(NUM_BYTES))])
    small[3] ^= 1
    with pytest.raises(PackedDamaged):
        PackedSource(memory(bytes(small)), len(small))


def test_no_descriptor_is_left_behind(path: Path, vector: bytes) -> None:
    before = len(os.listdir("/proc/self/fd"))
    small = packed(vector)
    for content in (small, b"no packed object at all"):
        try:
            PackedSource(memory(content), len(content)).read([memoryview(bytearray(NUM_BYTES))])
        except PackedDamaged:
            assert content != small
    MemorySource(memory(vector), NUM_BYTES).read([memoryview(bytearray(NUM_BYTES))])
    with FileSource(path, NUM_BYTES) as file:
        file.read([memoryview(bytearray(100))])
    with pytest.raises(AdapterRejected):
        FileSource(path, 5)
    assert len(os.listdir("/proc/self/fd")) == before
