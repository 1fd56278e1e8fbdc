"""Reads of stored files: every alignment, what the kernel may refuse or cut short, and what is left behind."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from rekindle.errors import StoredFileDamaged
from rekindle.protocol.storage import BLOCK_BYTES, StorageProfile
from rekindle.store.reading import FileRead, ReadCancelled, aligned_buffer, read_file
from rekindle.store.safetensors_file import DTYPE_BYTES, TensorStream, header_of, write_tensors

CHUNK = 4 * BLOCK_BYTES
SMALL = StorageProfile(chunk_bytes=CHUNK, num_threads=3)
FILLER = 0xA5
preadv = os.preadv


def content_of(num_bytes: int) -> bytes:
    return np.random.default_rng(num_bytes).bytes(num_bytes)


def stored(directory: Path, content: bytes) -> Path:
    path = directory / f"{len(content)}.bin"
    path.write_bytes(content)
    return path


def evict(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


Preadv = Callable[[int, Sequence[memoryview], int, int], int]


@dataclass
class Calls:
    """The `os.preadv` calls made, as (offset, length, is direct, flags), and what is called in its place."""

    sizes: list[tuple[int, int, bool, int]] = field(default_factory=list)
    instead: Preadv = preadv

    @property
    def num_direct(self) -> int:
        return sum(is_direct for _, _, is_direct, _ in self.sizes)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    def recorded(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        calls.sizes.append((offset, len(buffers[0]), is_direct(descriptor), flags))
        return calls.instead(descriptor, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", recorded)
    return calls


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory whose filesystem takes direct reads."""
    probe = stored(tmp_path, b"x" * BLOCK_BYTES)
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("the filesystem of temporary files takes no direct reads")
    probe.unlink()
    return tmp_path


SIZES = [
    whole + odd
    for whole in (0, BLOCK_BYTES, CHUNK - BLOCK_BYTES, CHUNK, 5 * CHUNK)
    for odd in (0, 1, 511, 512, 513, 4095)
]


@pytest.mark.parametrize("room", [0, BLOCK_BYTES], ids=["tight", "roomy"])
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "cold"])
@pytest.mark.parametrize("num_bytes", SIZES)
def test_a_file_of_any_length_is_read_whole(disk: Path, num_bytes: int, is_cached: bool, room: int) -> None:
    content = content_of(num_bytes)
    path = stored(disk, content)
    if not is_cached:
        evict(path)
    buffer = memoryview(mmap.mmap(-1, num_bytes + 2 * BLOCK_BYTES))
    buffer[:] = bytes([FILLER]) * len(buffer)
    assert read_file(path, buffer[: num_bytes + room], profile=SMALL) == num_bytes
    assert buffer[:num_bytes] == content
    untouched = buffer[num_bytes + room :]
    assert untouched == bytes([FILLER]) * len(untouched)


@pytest.mark.parametrize("offset", [0, 1, 512, 4095, BLOCK_BYTES, CHUNK + 1, 2 * CHUNK])
@pytest.mark.parametrize("into_page", [0, 1, 512, 4095])
@pytest.mark.parametrize("num_bytes", [0, 1, 4095, BLOCK_BYTES, 2 * CHUNK + 513])
def test_any_range_arrives_at_any_address(disk: Path, offset: int, into_page: int, num_bytes: int) -> None:
    content = content_of(6 * CHUNK)
    path = stored(disk, content)
    evict(path)
    buffer = memoryview(mmap.mmap(-1, 4 * CHUNK))
    buffer[:] = bytes([FILLER]) * len(buffer)
    target = buffer[into_page : into_page + num_bytes]
    read_file(path, target, offset=offset, num_bytes=num_bytes, profile=SMALL)
    assert target == content[offset : offset + num_bytes]
    assert set(buffer[:into_page]) | set(buffer[into_page + num_bytes :]) == {FILLER}


def test_a_cold_file_is_read_past_the_page_cache_in_aligned_chunks(disk: Path, calls: Calls) -> None:
    path = stored(disk, content_of(5 * CHUNK + 1))
    evict(path)
    read_file(path, memoryview(aligned_buffer(5 * CHUNK + 1)), profile=SMALL)
    assert sorted(calls.sizes) == [
        *((index * CHUNK, CHUNK, True, 0) for index in range(5)),
        (5 * CHUNK, BLOCK_BYTES, True, 0),
    ]


def test_what_the_page_cache_holds_is_copied_from_it(disk: Path, calls: Calls) -> None:
    path = stored(disk, content_of(3 * CHUNK))
    read_file(path, memoryview(aligned_buffer(3 * CHUNK)), profile=SMALL)
    assert (calls.num_direct, len(calls.sizes)) == (0, 3)
    assert {flags for _, _, _, flags in calls.sizes} == {os.RWF_NOWAIT}


def test_the_page_cache_is_left_alone_where_the_disk_is_measured_to_be_faster(disk: Path, calls: Calls) -> None:
    path = stored(disk, content_of(3 * CHUNK))
    fast_disk = StorageProfile(CHUNK, 3, direct_bytes_s=9e9, cached_bytes_s=5e9)
    read_file(path, memoryview(aligned_buffer(3 * CHUNK)), profile=fast_disk)
    assert (calls.num_direct, len(calls.sizes)) == (3, 3)


def test_pages_wrongly_said_to_be_cached_are_read_from_disk(
    disk: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(5 * CHUNK)
    path = stored(disk, content)

    def not_cached(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        if flags:
            raise OSError(errno.EAGAIN, "not in the cache")
        return preadv(descriptor, buffers, offset, flags)

    calls.instead = not_cached
    buffer = memoryview(aligned_buffer(len(content)))
    read_file(path, buffer, profile=StorageProfile(CHUNK, 1))
    assert buffer == content
    assert calls.num_direct == 5
    assert sum(flags != 0 for *_, flags in calls.sizes) == 1, "a miss makes the kernel read ahead; one is enough"


def test_a_chunk_of_which_the_cache_holds_only_the_ends_is_completed_from_disk(disk: Path, calls: Calls) -> None:
    content = content_of(CHUNK)
    path = stored(disk, content)

    def with_a_hole(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        return preadv(descriptor, [buffers[0][:BLOCK_BYTES]] if flags else buffers, offset, flags)

    calls.instead = with_a_hole
    buffer = memoryview(aligned_buffer(CHUNK))
    read_file(path, buffer, profile=SMALL)
    assert buffer == content
    assert calls.sizes == [(0, CHUNK, False, os.RWF_NOWAIT), (BLOCK_BYTES, CHUNK - BLOCK_BYTES, True, 0)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_opens_nothing_for_direct_reads_is_read_through_the_cache(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    content = content_of(3 * CHUNK + 1)
    path = stored(tmp_path, content)
    real_open = os.open

    def refusing(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", refusing)
    buffer = memoryview(aligned_buffer(len(content)))
    read_file(path, buffer, profile=SMALL)
    assert buffer[: len(content)] == content
    assert (calls.num_direct, len(calls.sizes)) == (0, 4)


def test_a_filesystem_that_refuses_direct_reads_once_open_is_read_through_the_cache(disk: Path, calls: Calls) -> None:
    content = content_of(5 * CHUNK + 1)
    path = stored(disk, content)
    evict(path)

    def refusing(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, "unaligned, says the filesystem")
        return preadv(descriptor, buffers, offset, flags)

    calls.instead = refusing
    buffer = memoryview(aligned_buffer(len(content)))
    read_file(path, buffer, profile=SMALL)
    assert buffer[: len(content)] == content
    assert 1 <= calls.num_direct <= SMALL.num_threads, "a refusal is remembered"


@pytest.mark.parametrize("most", [1, 511, 512, BLOCK_BYTES, BLOCK_BYTES + 512])
def test_reads_that_return_less_than_asked_for_are_continued(disk: Path, calls: Calls, most: int) -> None:
    content = content_of(CHUNK + 700)
    path = stored(disk, content)
    evict(path)
    calls.instead = lambda descriptor, buffers, offset, flags: (
        preadv(descriptor, buffers, offset, flags) and min(most, len(content) - offset, len(buffers[0]))
    )
    buffer = memoryview(aligned_buffer(len(content)))
    read_file(path, buffer, profile=SMALL)
    assert buffer[: len(content)] == content


@pytest.mark.parametrize("left", [0, 1, CHUNK, 2 * CHUNK + 513, 5 * CHUNK - 1])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    disk: Path, calls: Calls, left: int, num_threads: int
) -> None:
    path = stored(disk, content_of(5 * CHUNK))
    evict(path)
    shrunk = threading.Event()

    def shrinking(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        if not shrunk.is_set():
            shrunk.set()
            os.truncate(path, left)
        return preadv(descriptor, buffers, offset, flags)

    calls.instead = shrinking
    buffer = memoryview(aligned_buffer(5 * CHUNK))
    with pytest.raises(StoredFileDamaged, match=f"ended at byte .* of {5 * CHUNK} .* cut short"):
        read_file(path, buffer, profile=StorageProfile(CHUNK, num_threads))


def test_an_error_of_the_disk_names_the_file(disk: Path, calls: Calls) -> None:
    path = stored(disk, content_of(3 * CHUNK))
    evict(path)

    def broken(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    calls.instead = broken
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        read_file(path, memoryview(aligned_buffer(3 * CHUNK)), profile=SMALL)


def test_progress_is_in_order_though_chunks_arrive_in_any(disk: Path, calls: Calls) -> None:
    content = content_of(4 * CHUNK)
    path = stored(disk, content)
    evict(path)
    others_are_done = threading.Barrier(2)

    def first_chunk_last(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        count = preadv(descriptor, buffers, offset, flags)
        if offset in (0, 3 * CHUNK):
            others_are_done.wait(timeout=60)
        return count

    calls.instead = first_chunk_last
    buffer, seen = memoryview(aligned_buffer(len(content))), []
    with FileRead(path, buffer, profile=StorageProfile(CHUNK, 2)) as read:
        for ready in read:
            assert buffer[:ready] == content[:ready]
            seen.append(ready)
    assert seen == [CHUNK, 2 * CHUNK, 3 * CHUNK, 4 * CHUNK]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_cancelled_read_stops_between_chunks(disk: Path, calls: Calls, num_threads: int) -> None:
    path = stored(disk, content_of(40 * CHUNK))
    evict(path)
    with FileRead(path, memoryview(aligned_buffer(40 * CHUNK)), profile=StorageProfile(CHUNK, num_threads)) as read:

        def cancelling(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
            read.cancel()
            return preadv(descriptor, buffers, offset, flags)

        calls.instead = cancelling
        with pytest.raises(ReadCancelled):
            read.wait()
    assert len(calls.sizes) < 40


def test_leaving_a_read_early_ends_its_threads_before_the_buffer_may_go(disk: Path) -> None:
    path = stored(disk, content_of(40 * CHUNK))
    evict(path)
    before = threading.active_count()
    with FileRead(path, memoryview(aligned_buffer(40 * CHUNK)), profile=SMALL) as read:
        next(iter(read))
    assert threading.active_count() == before


def test_a_slow_read_does_not_delay_another(disk: Path, calls: Calls) -> None:
    slow, quick = stored(disk, content_of(8 * CHUNK)), stored(disk, content_of(9 * CHUNK))
    evict(slow)
    evict(quick)
    slow_inode, go_on = slow.stat().st_ino, threading.Event()

    def stuck(descriptor: int, buffers: Sequence[memoryview], offset: int, flags: int) -> int:
        if os.fstat(descriptor).st_ino == slow_inode:
            assert go_on.wait(timeout=60)
        return preadv(descriptor, buffers, offset, flags)

    calls.instead = stuck
    slow_buffer, buffer = memoryview(aligned_buffer(8 * CHUNK)), memoryview(aligned_buffer(9 * CHUNK))
    with FileRead(slow, slow_buffer, profile=SMALL) as slow_read:
        read_file(quick, buffer, profile=SMALL)  # would not return if it had to wait for the slow one
        assert buffer == content_of(9 * CHUNK)
        go_on.set()
        slow_read.wait()
    assert slow_buffer == content_of(8 * CHUNK)


def test_a_hundred_reads_at_once_each_get_their_own_file(disk: Path) -> None:
    paths = [stored(disk, content_of(3 * CHUNK + index)) for index in range(100)]

    def is_right(path: Path) -> bool:
        evict(path)
        num_bytes = path.stat().st_size
        buffer = memoryview(aligned_buffer(num_bytes))
        return read_file(path, buffer, profile=SMALL) == num_bytes and buffer[:num_bytes] == content_of(num_bytes)

    with ThreadPoolExecutor(len(paths)) as threads:
        assert all(threads.map(is_right, paths))


def test_a_buffer_is_private_memory_which_alone_may_lie_in_huge_pages() -> None:
    buffer = aligned_buffer(1 << 21)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(edge, 16) for edge in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split()[1] == "rw-p"
            return
    pytest.fail("the buffer is not mapped")


def test_a_thousand_reads_leave_no_descriptor_thread_or_mapping(disk: Path) -> None:
    path, torn = stored(disk, content_of(3 * CHUNK)), disk / "absent"
    buffer = memoryview(aligned_buffer(3 * CHUNK))

    def held() -> tuple[int, int, int]:
        mappings = Path("/proc/self/maps").read_text().count(str(path))
        return len(os.listdir("/proc/self/fd")), threading.active_count(), mappings

    before = held()
    for index in range(1000):
        if index % 3 == 0:
            with pytest.raises(OSError):
                read_file(torn, buffer)
            with pytest.raises(ValueError, match="needs as many writable bytes"):
                read_file(path, buffer[:BLOCK_BYTES])
        elif index % 3 == 1:
            with FileRead(path, buffer, profile=SMALL) as read:
                next(iter(read))
        else:
            read_file(path, buffer, profile=SMALL)
    assert held() == before


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 1), (0, 8193), (8193, None), (1, 8192), (0, -1)])
def test_a_range_outside_the_file_is_refused(tmp_path: Path, offset: int, num_bytes: int | None) -> None:
    path = stored(tmp_path, content_of(8192))
    with pytest.raises(ValueError, match="is not a range of them"):
        read_file(path, memoryview(aligned_buffer(1 << 15)), offset=offset, num_bytes=num_bytes)


def test_buffers_that_cannot_be_filled_are_refused(tmp_path: Path) -> None:
    path = stored(tmp_path, content_of(8192))
    for buffer in (memoryview(bytes(8192)), memoryview(bytearray(8191)), memoryview(np.zeros(8192, np.int32))):
        with pytest.raises(ValueError, match="needs as many writable bytes"):
            read_file(path, buffer)


@pytest.mark.parametrize("wrong", [{"chunk_bytes": 0}, {"chunk_bytes": 4097}, {"num_threads": 0}])
def test_a_profile_that_nothing_can_be_read_with_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        StorageProfile(**wrong)


def test_tensors_of_every_kind_are_views_of_the_buffer(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (5,), (1, 7)]
    expected = {
        f"{dtype}.{index}": (dtype, shape, content_of(int(np.prod(shape)) * DTYPE_BYTES[dtype]))
        for dtype in DTYPE_BYTES
        for index, shape in enumerate(shapes)
    }
    path = tmp_path / "kinds.safetensors"
    write_tensors(path, [TensorStream(name, *kind, [raw].copy) for name, (*kind, raw) in expected.items()])
    buffer = memoryview(aligned_buffer(path.stat().st_size))
    content = buffer[: read_file(path, buffer)]
    entries = header_of(content, path.name).entries
    assert entries.keys() == expected.keys()
    for name, entry in entries.items():
        view = content[entry.offset : entry.offset + entry.num_bytes]
        assert (entry.dtype, entry.shape, view) == expected[name]
        if entry.num_bytes:
            view[0] ^= 0xFF
            assert buffer[entry.offset] == view[0], "a view, not a copy"
