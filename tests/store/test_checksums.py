"""Checksums beside stored files: what they find, and what becomes of a damaged index."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from rekindle.errors import StoredFileDamaged
from rekindle.protocol.storage import StorageProfile
from rekindle.store.adapter_import import import_adapter
from rekindle.store.checksums import (
    CHUNK_BYTES,
    ChecksumBuilder,
    Checksums,
    checksums_path,
    read_checksums,
    write_checked_tensors,
)
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.store.reading import aligned_buffer, read_file
from rekindle.store.safetensors_file import TensorStream
from support.adapter_files import AdapterDirectory
from support.llama_directory import LlamaDirectory

CHUNK = 8192
PROFILE = StorageProfile(chunk_bytes=4096, num_threads=3)


def checksums_of(content: bytes, chunk_bytes: int = CHUNK) -> Checksums:
    builder = ChecksumBuilder(chunk_bytes)
    builder.update(content)
    return builder.finish("some.bin")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three chunks and a bit, with its checksums."""
    path = tmp_path / "some.bin"
    path.write_bytes(np.random.default_rng(0).bytes(3 * CHUNK + 100))
    checksums_path(path).write_bytes(checksums_of(path.read_bytes()).encode())
    return path


def read_verified(path: Path, **part: int) -> bytes:
    buffer = memoryview(aligned_buffer(path.stat().st_size))
    checksums = read_checksums(path)
    assert checksums is not None
    return bytes(buffer[: read_file(path, buffer, profile=PROFILE, verifier=checksums, **part)])


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.binary(max_size=50), max_size=12), chunk_bytes=st.integers(1, 64))
def test_checksums_are_those_of_each_chunk_however_the_bytes_came(pieces: list[bytes], chunk_bytes: int) -> None:
    builder = ChecksumBuilder(chunk_bytes)
    for piece in pieces:
        builder.update(piece)
    whole = b"".join(pieces)
    chunks = [whole[at : at + chunk_bytes] for at in range(0, len(whole), chunk_bytes)]
    expected = Checksums("any", chunk_bytes, len(whole), tuple(map(xxh3_64_intdigest, chunks)))
    assert builder.finish("any") == expected


def test_pieces_may_be_arrays_of_any_shape_and_type() -> None:
    array = np.arange(600, dtype=np.uint16).reshape(20, 30)
    builder = ChecksumBuilder(64)
    for piece in (array.data, np.zeros((0, 3), np.float32).data, np.float32(1.0).data):
        builder.update(piece)
    assert builder.finish("some.bin") == checksums_of(array.tobytes() + np.float32(1.0).tobytes(), 64)


def test_an_intact_file_is_read_and_verified(path: Path) -> None:
    assert read_verified(path) == path.read_bytes()


@pytest.mark.parametrize("position", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 4096, 3 * CHUNK, 3 * CHUNK + 99])
def test_a_flipped_bit_is_found_and_its_chunk_named(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)
    begin = position // CHUNK * CHUNK
    end = min(begin + CHUNK, len(content))
    with pytest.raises(StoredFileDamaged, match=rf"some\.bin is damaged: its bytes {begin} to {end} are not those"):
        read_verified(path)


@pytest.mark.parametrize("num_bytes", [0, 1, CHUNK, 3 * CHUNK + 99, 3 * CHUNK + 101])
def test_a_torn_file_is_found_by_its_length(path: Path, num_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(num_bytes)
    with pytest.raises(StoredFileDamaged, match=rf"has {num_bytes} bytes, its checksums are of {3 * CHUNK + 100}"):
        read_verified(path)


def test_whole_chunks_can_be_verified_alone(path: Path) -> None:
    content = path.read_bytes()
    assert read_verified(path, offset=CHUNK) == content[CHUNK:]
    assert read_verified(path, offset=CHUNK, num_bytes=CHUNK) == content[CHUNK : 2 * CHUNK]


@pytest.mark.parametrize("part", [{"offset": 4096}, {"offset": 0, "num_bytes": CHUNK + 1}])
def test_parts_of_chunks_cannot_be_verified_and_are_refused(path: Path, part: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"cannot be verified: checksums are of 8192 each"):
        read_verified(path, **part)


def test_a_file_imported_before_there_were_checksums_has_none(path: Path) -> None:
    checksums_path(path).unlink()
    assert read_checksums(path) is None


def test_an_empty_file_has_checksums_too(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    checksums_path(path).write_bytes(checksums_of(b"").encode())
    assert read_verified(path) == b""


def test_an_index_torn_anywhere_is_refused(path: Path) -> None:
    index = checksums_path(path)
    raw = index.read_bytes()
    for length in range(len(raw)):
        index.write_bytes(raw[:length])
        with pytest.raises(StoredFileDamaged, match=r"some\.bin\.xxh3 is damaged"):
            read_checksums(path)
    index.write_bytes(raw + bytes(8))
    with pytest.raises(StoredFileDamaged, match="its own checksum does not match"):
        read_checksums(path)


def test_an_index_with_any_bit_flipped_is_refused(path: Path) -> None:
    index = checksums_path(path)
    raw = index.read_bytes()
    for position in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[position // 8] ^= 1 << position % 8
        index.write_bytes(flipped)
        with pytest.raises(StoredFileDamaged, match=r"some\.bin\.xxh3 is damaged"):
            read_checksums(path)


@pytest.mark.parametrize(("chunk_bytes", "file_bytes"), [(0, 100), (CHUNK, 3 * CHUNK), (CHUNK, 2**63)])
def test_an_index_whose_numbers_do_not_fit_is_refused(path: Path, chunk_bytes: int, file_bytes: int) -> None:
    index = checksums_path(path)
    raw = bytearray(index.read_bytes())
    raw[8:24] = struct.pack("<2Q", chunk_bytes, file_bytes)
    raw[-8:] = struct.pack("<Q", xxh3_64_intdigest(bytes(raw[:-8])))
    index.write_bytes(raw)
    with pytest.raises(StoredFileDamaged, match=f"4 checksums for {file_bytes} bytes in chunks of {chunk_bytes}"):
        read_checksums(path)


def test_files_are_written_with_checksums_that_hold(tmp_path: Path) -> None:
    path, observed = tmp_path / "any.safetensors", bytearray()
    content = np.random.default_rng(1).bytes(CHUNK_BYTES + 1)
    pieces = [content[:1000], content[1000:]]
    stream = TensorStream("x", "U8", (len(content),), pieces.copy)
    write_checked_tensors(path, [stream], metadata={"format": "pt"}, observe=observed.extend)
    assert observed == content
    assert read_verified(path) == path.read_bytes()


def test_imported_adapters_and_models_are_verified_while_they_are_read(
    tmp_path: Path, home: Home, llama: LlamaDirectory
) -> None:
    adapter = AdapterDirectory(tmp_path / "adapter").target("q_proj", "v_proj")
    adapter_digest = import_adapter(adapter.write(), adapter.base, adapter.write_base(), home).digest
    model_digest = import_model(llama.write(), home).digest
    for stored in (
        home.adapter_directory(adapter_digest) / "adapter.safetensors",
        home.model_directory(model_digest) / "model.safetensors",
    ):
        content = bytearray(stored.read_bytes())
        assert read_verified(stored) == content
        content[-1] ^= 1
        stored.write_bytes(content)
        with pytest.raises(StoredFileDamaged, match="its bytes 0 to"):
            read_verified(stored)
