"""Checks of mapped files: what is found, what is brought into the page cache, and what is left behind."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from rekindle.errors import StoredFileDamaged
from rekindle.store.checksums import ChecksumBuilder, Checksums
from rekindle.store.mapped_check import MappedCheck
from rekindle.store.reading import resident_share

CHUNK = 1 << 16
NUM_BYTES = 20 * CHUNK + 123
CONTENT = np.random.default_rng(0).bytes(NUM_BYTES)


def checksums() -> Checksums:
    builder = ChecksumBuilder(CHUNK)
    builder.update(CONTENT)
    return builder.finish("a.bin")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def mapping(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_a_whole_file_passes_and_one_flipped_bit_does_not(path: Path, mapping: memoryview, reads_ahead: bool) -> None:
    with MappedCheck(path, mapping, 2, checksums(), reads_ahead=reads_ahead) as check:
        check.add(0, NUM_BYTES)
        check.wait()
    with path.open("r+b") as file:
        file.seek(NUM_BYTES - 1)
        file.write(bytes([CONTENT[-1] ^ 1]))
    with MappedCheck(path, mapping, 2, checksums(), reads_ahead=reads_ahead) as check:
        check.add(0, 20 * CHUNK)
        check.wait()
        check.add(20 * CHUNK, NUM_BYTES)
        with pytest.raises(StoredFileDamaged, match=f"a.bin is damaged: its bytes {20 * CHUNK} to {NUM_BYTES}"):
            check.wait()


def test_a_chunk_is_looked_at_once(path: Path, mapping: memoryview) -> None:
    looked_at: list[tuple[int, int]] = []

    class Recording:
        chunk_bytes, file_bytes = CHUNK, NUM_BYTES

        def verify(self, offset: int, chunk: memoryview) -> None:
            looked_at.append((offset, len(chunk)))

    with MappedCheck(path, mapping, 1, Recording(), reads_ahead=False) as check:
        for begin, end in ((CHUNK + 5, CHUNK + 6), (0, 2 * CHUNK + 1), (20 * CHUNK, NUM_BYTES), (3, 3)):
            check.add(begin, end)
        check.wait()
    assert looked_at == [(CHUNK, CHUNK), (0, CHUNK), (2 * CHUNK, CHUNK), (20 * CHUNK, 123)]


def test_what_is_added_is_brought_into_the_page_cache_also_without_checksums(path: Path, mapping: memoryview) -> None:
    evict(path)
    if resident_share(path):
        pytest.skip("the filesystem of temporary files keeps its pages")
    with MappedCheck(path, mapping, 2, None, reads_ahead=True) as check:
        check.add(0, NUM_BYTES)
        check.wait()
        assert mapping == CONTENT
    assert resident_share(path) == 1


def test_a_check_that_is_left_holds_no_threads_and_descriptors(path: Path, mapping: memoryview) -> None:
    num_open, num_threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(20):
        with MappedCheck(path, mapping, 3, checksums(), reads_ahead=True) as check:
            check.add(0, NUM_BYTES)
    assert len(os.listdir("/proc/self/fd")) <= num_open  # fewer, when something from before was collected
    assert threading.active_count() <= num_threads
