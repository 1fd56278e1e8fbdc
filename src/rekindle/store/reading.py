"""Reads a range of a stored file into memory at the rate of the device that holds it.

A range is split at multiples of the chunk size into chunks that several threads read past the page cache (O_DIRECT)
into the caller's buffer, each taking the next one as soon as it is free: those at the front are there first, and what
follows a read (a copy to a device) starts with the first of them. What the page cache holds already is copied from
there if that is faster. Where direct reads are refused, at opening or later, all is read through the page cache.

Every read has threads of its own, so that none waits for a slower one; four of them start in half a millisecond, less
than a tenth of what the smallest range that gets four takes at 2 GB/s. A range of one chunk is read in the caller's
thread.

Knows nothing of what files hold.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rekindle.closing import Closing
from rekindle.errors import StoredFileDamaged
from rekindle.protocol.storage import BLOCK_BYTES, DEFAULT_PROFILE, StorageProfile

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

_NO_DIRECT_READS = {errno.EINVAL, errno.EOPNOTSUPP}
_NOT_FROM_CACHE = {errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL}


class ReadCancelled(Exception):
    """The read ended before its last byte because its owner cancelled it."""


class Verifier(Protocol):
    """What knows how the chunks of one file must look."""

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def file_bytes(self) -> int: ...

    def verify(self, offset: int, chunk: memoryview) -> None:
        """Raise `StoredFileDamaged` unless `chunk` is what belongs at `offset`. Called in several threads at once."""
        ...


def aligned_buffer(num_bytes: int) -> mmap.mmap:
    """Zeroed memory for a read of `num_bytes` that begins at a block: page-aligned, a multiple of a block long.

    It is private, because only such memory comes in huge pages where it is asked to: into small pages, scattered as
    they come, a virtual disk was seen to read at half its rate.
    """
    buffer = mmap.mmap(-1, max(_round_up(num_bytes), BLOCK_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # kernels built without huge pages
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def read_file(
    path: Path,
    buffer: memoryview,
    *,
    offset: int = 0,
    num_bytes: int | None = None,
    profile: StorageProfile = DEFAULT_PROFILE,
    verifier: Verifier | None = None,
) -> int:
    """Read as `FileRead` does and wait for the end; returns how many bytes were read."""
    with FileRead(path, buffer, offset=offset, num_bytes=num_bytes, profile=profile, verifier=verifier) as read:
        read.wait()
        return read.num_bytes


def resident_share(path: Path) -> float:
    """Which share of a file's pages the page cache holds; 1 for an empty file, and for one that is not ours to write,
    of which the kernel does not tell."""
    with path.open("rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if not num_bytes:
            return 1.0
        residency = _Residency(file.fileno(), num_bytes)
        try:
            return residency.share()
        finally:
            residency.close()


class FileRead(Closing):
    """One read under way: of `num_bytes` bytes from `offset` on (all that follow, if None) to the start of `buffer`.

    It begins at once and goes on in threads of its own until it is done, cancelled, or closed at the end of the `with`
    block; `buffer` must live that long. Iterate over it, or `wait`; both raise

        StoredFileDamaged: the file has become shorter than it was at the start, or `verifier` says so. What the buffer
            holds is then to be thrown away.
        ReadCancelled: `cancel` was called.
        OSError: the file cannot be read.

    `buffer` is writable bytes. Reads are direct where its address and `offset` are equal modulo `BLOCK_BYTES`, as they
    are for a page-aligned buffer and a whole file, and go through the page cache otherwise. Where it is longer than
    `num_bytes`, up to one block more may be overwritten; that saves a second read of a last block that is not full.

    With a `verifier`, `offset` and the range's end must be multiples of its `chunk_bytes`, or the end that of the file.

    With `is_ring` the buffer may be shorter than the range, and is a multiple of the chunk size long: byte i of the
    range comes to i modulo its length, once what was there before is given up with `release`.

    Raises:
        ValueError: the range lies outside the file, the buffer is too small, or the verifier's chunks do not fit.
        StoredFileDamaged: the file's length is not the verifier's.
        OSError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        buffer: memoryview,
        *,
        offset: int = 0,
        num_bytes: int | None = None,
        profile: StorageProfile = DEFAULT_PROFILE,
        verifier: Verifier | None = None,
        is_ring: bool = False,
    ) -> None:
        self._resources = ExitStack()
        self._released, self._room = 0, threading.Condition()
        self._is_cancelled = threading.Event()
        with ExitStack() as undo:
            self._file = _StoredFile(path, profile.prefers_cache)
            undo.callback(self.close)
            self.num_bytes = self._file.num_bytes - offset if num_bytes is None else num_bytes
            self._end = offset + self.num_bytes
            chunk_bytes = profile.chunk_bytes if verifier is None else verifier.chunk_bytes
            self._ring_chunk_bytes = chunk_bytes if is_ring else None
            self._check_range(path, buffer, offset)
            if verifier is not None:
                _check_verifier(verifier, path, offset, self._end, self._file.num_bytes)
            if not _are_congruent(buffer, offset):
                self._file.read_buffered_only()
            self._buffer, self._offset, self._verifier = buffer, offset, verifier
            self._piece_bytes = profile.chunk_bytes
            self._chunks = _split(offset, self._end, chunk_bytes)
            self._futures = self._start(min(profile.num_threads, len(self._chunks)))
            undo.pop_all()

    def __iter__(self) -> Iterator[int]:
        """How many bytes from the buffer's start on are there, each time that grows; at last `num_bytes`, if not 0."""
        for index, (begin, end) in enumerate(self._chunks):
            if self._futures:
                self._futures[index].result()
            else:
                self._read_chunk(begin, end)
            yield end - self._offset

    def wait(self) -> None:
        """Return when all bytes are there."""
        for _ in self:
            pass

    @property
    def is_direct(self) -> bool:
        """Whether what the page cache lacks is, so far, read past it."""
        return self._file.is_direct

    def release(self, num_bytes: int) -> None:
        """Give up what a ring holds of the range's first `num_bytes` bytes."""
        with self._room:
            self._released = num_bytes
            self._room.notify_all()

    def cancel(self) -> None:
        """Make the read end after the pieces that its threads are at. May be called from any thread."""
        with self._room:
            self._is_cancelled.set()
            self._room.notify_all()

    def close(self) -> None:
        """Cancel what is left and return when no thread writes to the buffer any more."""
        self.cancel()
        self._resources.close()
        self._file.close()

    def _check_range(self, path: Path, buffer: memoryview, offset: int) -> None:
        if offset < 0 or self.num_bytes < 0 or self._end > self._file.num_bytes:
            raise ValueError(
                f"{path.name} has {self._file.num_bytes} bytes; {offset} to {self._end} is not a range of them"
            )
        chunk_bytes = self._ring_chunk_bytes
        is_writable = not buffer.readonly and buffer.format in ("B", "b", "c") and buffer.ndim == 1
        if not is_writable or (chunk_bytes is None and len(buffer) < self.num_bytes):
            raise ValueError(
                f"a read of {self.num_bytes} bytes needs as many writable bytes in a row; the buffer has "
                f"{buffer.nbytes} of format {buffer.format}{', read-only' if buffer.readonly else ''}"
            )
        if chunk_bytes is not None and (len(buffer) < chunk_bytes or len(buffer) % chunk_bytes or offset % chunk_bytes):
            raise ValueError(
                f"a ring of {len(buffer)} bytes, for what follows byte {offset}, is not made of chunks of {chunk_bytes}"
            )

    def _start(self, num_threads: int) -> list[Future[None]]:
        if num_threads < 2:
            return []
        threads = ThreadPoolExecutor(num_threads, "rekindle-read")
        self._resources.callback(threads.shutdown, cancel_futures=True)
        return [threads.submit(self._read_chunk, begin, end) for begin, end in self._chunks]

    def _read_chunk(self, begin: int, end: int) -> None:
        self._await_room(end)
        place = (begin - self._offset) % len(self._buffer)
        # Only behind the last chunk is nothing else; in a ring it has its place to itself, and no more.
        room = end - begin if end < self._end else self._ring_chunk_bytes
        target = self._buffer[place : None if room is None else place + room]
        for position in range(begin, end, self._piece_bytes):
            if self._is_cancelled.is_set():
                raise ReadCancelled(f"the read of {self._file.path.name} was cancelled")
            count = min(end - position, self._piece_bytes)
            room = len(target) if position + count == end else position + count - begin
            self._file.fill(target[position - begin : room], position, count)
        if self._verifier is not None:
            self._verifier.verify(begin, target[: end - begin])

    def _await_room(self, end: int) -> None:
        with self._room:
            self._room.wait_for(
                lambda: self._is_cancelled.is_set() or end - self._offset <= self._released + len(self._buffer)
            )


class _StoredFile:
    """A file open for direct and for buffered reads by many threads.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, prefers_cache: bool) -> None:
        self.path = path
        self._resources = ExitStack()
        with self._resources as resources:
            self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            resources.callback(os.close, self._buffered)
            self.num_bytes = os.fstat(self._buffered).st_size
            self._direct = _open_direct(path)
            if self._direct is not None:
                resources.callback(os.close, self._direct)
            self._residency: _Residency | None = None
            if prefers_cache and self._direct is not None and self.num_bytes:
                self._residency = _Residency(self._buffered, self.num_bytes)
                resources.callback(self._residency.close)
            self._resources = resources.pop_all()

    @property
    def is_direct(self) -> bool:
        return self._direct is not None

    def read_buffered_only(self) -> None:
        """Make no direct reads from now on."""
        self._direct = None

    def fill(self, target: memoryview, position: int, num_bytes: int) -> None:
        """Fill the first `num_bytes` bytes of `target`, and perhaps the rest of their last block."""
        try:
            done = self._copy_from_cache(target[:num_bytes], position)
            while done < num_bytes:
                count = self._read(target[done:], position + done, num_bytes - done)
                if count == 0:
                    raise StoredFileDamaged(
                        f"{self.path} ended at byte {position + done} while it was read, of {self.num_bytes} that it "
                        "had at the start: it was cut short; import it again"
                    )
                done += count
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        self._resources.close()

    def _read(self, target: memoryview, position: int, num_bytes: int) -> int:
        """One call's worth; a direct read may count bytes beyond `num_bytes`, which lie behind the range."""
        direct = self._direct
        if direct is not None:
            into_block = position % BLOCK_BYTES
            if into_block:  # the head of the range, or after a direct read that ended at the end of the file
                num_bytes = min(num_bytes, BLOCK_BYTES - into_block)
            elif length := min(_round_up(num_bytes), len(target) // BLOCK_BYTES * BLOCK_BYTES):
                try:
                    return os.preadv(direct, [target[:length]], position)
                except OSError as error:
                    if error.errno not in _NO_DIRECT_READS:
                        raise
                    self.read_buffered_only()
        return os.preadv(self._buffered, [target[:num_bytes]], position)

    def _copy_from_cache(self, target: memoryview, position: int) -> int:
        """How many bytes the page cache gave. A miss would make the kernel read ahead, so residency is asked first."""
        residency = self._residency
        if residency is None or self._direct is None or not residency.has_ends_of(position, len(target)):
            return 0
        try:
            return os.preadv(self._buffered, [target], position, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in _NOT_FROM_CACHE:
                raise
            # What residency says is not so: the kernel calls all pages of other users' files resident.
            self._residency = None
            return 0


class _Residency:
    """Which pages of an open file the page cache holds, by way of a mapping whose pages are never touched."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self._map = mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data
        self._num_bytes = num_bytes

    def has_ends_of(self, position: int, length: int) -> bool:
        """Whether the first and the last page of a range are resident. Asking for all takes a fifth of copying them."""
        return self._has(position) and self._has(position + length - 1)

    def share(self) -> float:
        """Which share of all pages is resident."""
        return float(np.mean(self._are_resident(0, self._num_bytes)))

    def close(self) -> None:
        self._map.close()

    def _has(self, position: int) -> bool:
        return bool(self._are_resident(position - position % mmap.PAGESIZE, 1)[0])

    def _are_resident(self, first: int, length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        pages = np.zeros(-(-length // mmap.PAGESIZE), np.uint8)
        if _libc.mincore(self._address + first, length, pages.ctypes.data):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return pages & np.uint8(1)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _NO_DIRECT_READS:
            raise
        return None


def check_length(verifier: Verifier, path: Path, file_bytes: int) -> None:
    """Raise StoredFileDamaged unless the file at `path`, of so many bytes, has the length it must have."""
    if verifier.file_bytes != file_bytes:
        raise StoredFileDamaged(
            f"{path} has {file_bytes} bytes, its checksums are of {verifier.file_bytes}: it is torn or was replaced; "
            "import it again"
        )


def _check_verifier(verifier: Verifier, path: Path, offset: int, end: int, file_bytes: int) -> None:
    check_length(verifier, path, file_bytes)
    if offset % verifier.chunk_bytes or (end % verifier.chunk_bytes and end != file_bytes):
        raise ValueError(
            f"bytes {offset} to {end} of {path.name} cannot be verified: checksums are of {verifier.chunk_bytes} each"
        )


def _are_congruent(buffer: memoryview, offset: int) -> bool:
    if not len(buffer):
        return False
    return (ctypes.addressof(ctypes.c_char.from_buffer(buffer)) - offset) % BLOCK_BYTES == 0


def _split(begin: int, end: int, chunk_bytes: int) -> list[tuple[int, int]]:
    """The range in parts that end at multiples of `chunk_bytes`."""
    inner = range(begin - begin % chunk_bytes + chunk_bytes, end, chunk_bytes)
    edges = [begin, *inner, end] if end > begin else []
    return list(itertools.pairwise(edges))


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
