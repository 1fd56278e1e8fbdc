"""Streams of files: what is given out, what is put aside, what is refused, and how much memory it takes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rekindle.errors import StoredFileDamaged
from rekindle.protocol.storage import BLOCK_BYTES, StorageProfile
from rekindle.store.checksums import ChecksumBuilder, Checksums
from rekindle.store.file_stream import FileStream, Range
from rekindle.store.reading import FileRead, ReadCancelled, aligned_buffer

CHUNK = 2 * BLOCK_BYTES
PROFILE = StorageProfile(CHUNK, 3)
RING_CHUNKS = 5
SIZES = [1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 1, 23 * CHUNK + 4095]


def content_of(num_bytes: int) -> bytes:
    return np.random.default_rng(num_bytes).bytes(num_bytes)


def stored(directory: Path, num_bytes: int) -> tuple[Path, bytes]:
    path, content = directory / f"{num_bytes}.bin", content_of(num_bytes)
    path.write_bytes(content)
    return path, content


def ring(num_chunks: int = RING_CHUNKS, chunk_bytes: int = CHUNK) -> memoryview:
    return memoryview(aligned_buffer(num_chunks * chunk_bytes))[: num_chunks * chunk_bytes]


def checksums_of(path: Path, content: bytes, chunk_bytes: int = CHUNK) -> Checksums:
    builder = ChecksumBuilder(chunk_bytes)
    builder.update(content)
    return builder.finish(str(path))


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(stream: FileStream, begin: int, end: int, unit: int = 1) -> bytes:
    found = bytearray()
    for piece in stream.pieces(begin, end, unit):
        assert len(piece) % unit == 0 or len(found) + len(piece) == end - begin
        found += piece
    return bytes(found)


@pytest.mark.parametrize("num_bytes", SIZES)
@pytest.mark.parametrize("unit", [1, 7, CHUNK, CHUNK + 1, 6 * CHUNK + 5])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_file_of_any_length_streams_whole_in_pieces_of_whole_units(
    tmp_path: Path, num_bytes: int, unit: int, num_threads: int
) -> None:
    path, content = stored(tmp_path, num_bytes)
    evict(path)
    stream = FileStream(
        path, 0, ring(), profile=StorageProfile(CHUNK, num_threads), verifier=checksums_of(path, content)
    )
    assert read(stream, 0, num_bytes, unit) == content
    stream.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edges=st.lists(st.integers(0, 23 * CHUNK + 4095), min_size=2, max_size=12).map(sorted),
    unit=st.integers(1, 3 * CHUNK),
    chunk_bytes=st.sampled_from([CHUNK, 4096, 5000, 777]),
)
def test_ranges_in_order_come_right_whatever_lies_between_them(
    tmp_path: Path, edges: Sequence[int], unit: int, chunk_bytes: int
) -> None:
    """Chunks that are no multiple of a block, too, where reads are not direct."""
    path, content = stored(tmp_path, 23 * CHUNK + 4095)
    stream = FileStream(
        path,
        edges[0],
        ring(7, chunk_bytes),
        profile=PROFILE,
        verifier=checksums_of(path, content, chunk_bytes),
    )
    for begin, end in itertools.pairwise(edges):
        if stream.reaches(begin) and end > begin:
            assert read(stream, begin, end, unit) == content[begin:end]
    stream.close()


def test_what_has_passed_or_is_far_ahead_is_not_reached(tmp_path: Path) -> None:
    path, content = stored(tmp_path, 40 * CHUNK)
    stream = FileStream(path, CHUNK + 1, ring(), profile=PROFILE)
    assert not stream.reaches(CHUNK - 1)
    assert stream.reaches(CHUNK) and stream.reaches(6 * CHUNK - 1)
    assert not stream.reaches(6 * CHUNK)
    assert read(stream, 5 * CHUNK, 20 * CHUNK) == content[5 * CHUNK : 20 * CHUNK]
    assert not stream.reaches(5 * CHUNK)
    assert stream.reaches(20 * CHUNK)
    stream.close()


def test_ranges_put_aside_are_given_once_they_have_passed_and_once_only(tmp_path: Path) -> None:
    path, content = stored(tmp_path, 40 * CHUNK)
    early, here, across, ahead, far = (
        (10, 20),
        (CHUNK, CHUNK + 1),
        (7 * CHUNK - 5, 9 * CHUNK + 3),
        (12 * CHUNK, 12 * CHUNK + 9),
        (39 * CHUNK, 39 * CHUNK + 9),
    )
    unknown = (11 * CHUNK, 11 * CHUNK + 1)
    stream = FileStream(path, CHUNK, ring(), aside=[far, across, here, early, ahead], profile=PROFILE)

    def taken(wanted: Range) -> bytes | None:
        found = stream.taken(wanted)
        assert found is None or found == content[slice(*wanted)]
        return None if found is None else bytes(found)

    assert taken(early) is None  # before the stream's begin
    assert taken(here) is not None  # not asked for yet, but being read
    assert taken(across) is None and taken(far) is None
    assert read(stream, 2 * CHUNK, 11 * CHUNK) == content[2 * CHUNK : 11 * CHUNK]
    assert taken(unknown) is None
    assert taken(across) is not None and taken(across) is None
    assert taken(ahead) is not None
    assert taken(far) is None
    assert read(stream, 11 * CHUNK, 40 * CHUNK) == content[11 * CHUNK :]
    assert taken(far) is not None
    stream.close()


def test_nothing_is_overwritten_before_it_is_said_so(tmp_path: Path) -> None:
    """As a GPU copies from the ring after the host has gone on: all that was given since the last call is whole."""
    path, content = stored(tmp_path, 40 * CHUNK)
    given_out: list[tuple[int, memoryview]] = []
    num_calls = 0

    def before_reuse() -> None:
        nonlocal num_calls
        num_calls += 1
        for begin, piece in given_out:
            assert piece == content[begin : begin + len(piece)]
        given_out.clear()

    stream = FileStream(path, 0, ring(8), profile=PROFILE, before_reuse=before_reuse)
    position = 0
    for piece in stream.pieces(0, 40 * CHUNK, 4):
        given_out.append((position, piece))
        position += len(piece)
    time.sleep(0.02)  # for threads that would write where they must not
    assert given_out
    stream.close()
    assert position == 40 * CHUNK and num_calls > 8 and not given_out


@pytest.mark.parametrize("at", [0, 3 * CHUNK + 17, 40 * CHUNK - 1])
def test_a_flipped_bit_ends_the_stream_where_it_is_and_names_it(tmp_path: Path, at: int) -> None:
    path, content = stored(tmp_path, 40 * CHUNK)
    verifier = checksums_of(path, content)
    damaged = bytearray(content)
    damaged[at] ^= 4
    path.write_bytes(damaged)
    stream = FileStream(path, 0, ring(), profile=PROFILE, verifier=verifier)
    found = bytearray()
    begin = at - at % CHUNK
    with pytest.raises(StoredFileDamaged, match=f"{path} is damaged: its bytes {begin} to {begin + CHUNK}"):
        for piece in stream.pieces(0, 40 * CHUNK, 1):
            found += piece
    stream.close()
    assert found == content[: len(found)] and len(found) <= begin


def test_a_file_that_is_cut_short_meanwhile_ends_the_stream(tmp_path: Path) -> None:
    path, _ = stored(tmp_path, 40 * CHUNK)
    stream = FileStream(path, 0, ring(), profile=PROFILE)
    pieces = stream.pieces(0, 40 * CHUNK, 1)
    next(pieces)
    os.truncate(path, 20 * CHUNK + 5)
    with pytest.raises(StoredFileDamaged, match=f"ended at byte {20 * CHUNK + 5}"):
        for _ in pieces:
            pass
    stream.close()


def test_a_stream_that_is_left_alone_holds_no_threads_and_descriptors(tmp_path: Path) -> None:
    path, content = stored(tmp_path, 40 * CHUNK)

    def held() -> tuple[int, int, int]:
        mappings = Path("/proc/self/maps").read_text().count(str(path))
        return len(os.listdir("/proc/self/fd")), threading.active_count(), mappings

    before = held()
    for index in range(30):
        stream = FileStream(path, 0, ring(), profile=PROFILE, verifier=checksums_of(path, content))
        for _ in itertools.islice(stream.pieces(0, 40 * CHUNK, 1), index):
            pass
        stream.close()
    with pytest.raises(StoredFileDamaged, match="its checksums are of"):
        FileStream(path, 0, ring(), profile=PROFILE, verifier=checksums_of(path, content + b"1"))
    assert held() == before


@pytest.mark.parametrize(("num_bytes", "offset"), [(CHUNK - 1, 0), (3 * CHUNK + 1, 0), (3 * CHUNK, 1), (0, 0)])
def test_rings_that_are_not_made_of_chunks_are_refused(tmp_path: Path, num_bytes: int, offset: int) -> None:
    path, _ = stored(tmp_path, 40 * CHUNK)
    buffer = memoryview(aligned_buffer(4 * CHUNK))[:num_bytes]
    with pytest.raises(ValueError, match="is not made of chunks"):
        FileRead(path, buffer, offset=offset, profile=PROFILE, is_ring=True)


def test_a_ring_that_nobody_empties_stops_the_read_until_it_is_cancelled(tmp_path: Path) -> None:
    path, content = stored(tmp_path, 40 * CHUNK)
    buffer = ring(4)
    with FileRead(path, buffer, profile=PROFILE, is_ring=True) as under_way:
        arrivals = iter(under_way)
        assert [next(arrivals) for _ in range(4)] == [CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK]
        time.sleep(0.02)
        assert buffer == content[: 4 * CHUNK]
        under_way.release(CHUNK)
        assert next(arrivals) == 5 * CHUNK
        assert buffer[:CHUNK] == content[4 * CHUNK : 5 * CHUNK]
        threading.Timer(0.02, under_way.cancel).start()
        with pytest.raises(ReadCancelled):
            next(arrivals)


MEASURED = """
import resource, sys
from pathlib import Path
from rekindle.protocol.storage import StorageProfile
from rekindle.store.file_stream import FileStream
from rekindle.store.reading import aligned_buffer
path, ring = Path(sys.argv[1]), memoryview(aligned_buffer(8 << 20))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stream = FileStream(path, 0, ring, profile=StorageProfile(1 << 20, 4))
print(sum(len(piece) for piece in stream.pieces(0, path.stat().st_size, 3)))
stream.close()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        for _ in range(300):
            file.write(os.urandom(1 << 20))
    evict(path)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True)
    num_read, grown = map(int, done.stdout.split())
    assert num_read == 300 << 20
    assert grown < 24 << 20
