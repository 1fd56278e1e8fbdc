"""An adapter's flat vector as bytes on their way to a device: from its file, or from host memory, plain or packed.

Sources are read once, from the first byte to the last, in whatever pieces the reader likes, and what they give is
verified on the way: a file against its checksums, packed frames against theirs. Memory was verified when it was filled.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from rekindle.closing import Closing
from rekindle.errors import AdapterRejected
from rekindle.store.checksums import ChecksumFollower, read_checksums
from rekindle.store.codecs.packed import open_packed
from rekindle.store.codecs.registry import codec_for
from rekindle.store.safetensors_file import read_raw_header

PIECE_BYTES = 64 << 10
"""How much is read or copied between two calls of `rest`."""


class VectorSource(Protocol):
    """`num_bytes` bytes. `rest` is called after every little piece of work."""

    num_bytes: int

    def read(self, targets: Sequence[memoryview]) -> None:
        """Fill buffers of bytes, one after the other, with the next bytes.

        Raises:
            StoredFileDamaged, PackedDamaged: these are not the bytes that were imported.
            OSError: they cannot be read.
        """
        ...


class FileSource(Closing):
    """The vector of a stored adapter, `num_bytes` long: the file's bytes after its header.

    Raises:
        AdapterRejected: the file holds another number of bytes.
        StoredFileDamaged: the index of its checksums is damaged.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, num_bytes: int, rest: Callable[[], None] = lambda: None) -> None:
        self.num_bytes, self._rest = num_bytes, rest
        checksums = read_checksums(path)
        with ExitStack() as resources:
            file = resources.enter_context(path.open("rb", buffering=0))
            # What is in the header the importer has checked, and the manifest tells.
            header = read_raw_header(file, path.name, rejected=AdapterRejected)
            self._descriptor, self._position, self._left = file.fileno(), len(header), num_bytes
            found = os.fstat(file.fileno()).st_size - len(header)
            if found != num_bytes:
                raise AdapterRejected(f"{path.name} holds {found} bytes of tensors, {num_bytes} expected")
            self._follower = None if checksums is None else ChecksumFollower(checksums)
            if self._follower is not None:
                self._follower.update(header)
            self._resources = resources.pop_all()

    def read(self, targets: Sequence[memoryview]) -> None:
        for target in targets:
            done = 0
            while done < len(target):
                piece = target[done : done + PIECE_BYTES]
                count = os.preadv(self._descriptor, [piece], self._position)
                if count == 0:
                    raise AdapterRejected(f"the adapter's file ends at byte {self._position}, before all its tensors")
                done += count
                self._position += count
                self._left -= count
                self._follow(piece[:count])
                self._rest()

    def close(self) -> None:
        self._resources.close()

    def _follow(self, piece: memoryview) -> None:
        if self._follower is not None:
            self._follower.update(piece)
            if not self._left:
                self._follower.finish()


class MemorySource:
    """A vector that is an anonymous file of `num_bytes`; takes the descriptor."""

    def __init__(self, descriptor: int, num_bytes: int, rest: Callable[[], None] = lambda: None) -> None:
        self.num_bytes, self._rest = num_bytes, rest
        self._map = _mapped(descriptor, num_bytes)
        self._position = 0

    def read(self, targets: Sequence[memoryview]) -> None:
        for target in targets:
            for first in range(0, len(target), PIECE_BYTES):
                piece = target[first : first + PIECE_BYTES]
                piece[:] = self._map[self._position : self._position + len(piece)]
                self._position += len(piece)
                self._rest()


class PackedSource:
    """A vector packed in an anonymous file of `packed_bytes` bytes; takes the descriptor.

    Whole frames are unpacked where they belong, by the threads of `executor` while it gives any; those that straddle
    targets by way of a buffer.

    Raises:
        PackedDamaged: the file is not sound.
    """

    def __init__(
        self,
        descriptor: int,
        packed_bytes: int,
        executor: Callable[[], Executor | None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._packed = open_packed(_mapped(descriptor, packed_bytes))
        self._codec = codec_for(self._packed.format)
        self.num_bytes, self._executor, self._rest = self._packed.num_bytes, executor, rest
        self._next = 0
        self._left_over = memoryview(b"")

    def read(self, targets: Sequence[memoryview]) -> None:
        for target in targets:
            done = self._take_left_over(target)
            done += self._unpack_whole(target[done:])
            if done < len(target):
                self._left_over = memoryview(bytearray(self._packed.frames[self._next].unpacked_bytes))
                self._packed.unpack_frames(self._codec, [(self._next, self._left_over)], rest=self._rest)
                self._next += 1
                self._take_left_over(target[done:])

    def _take_left_over(self, target: memoryview) -> int:
        count = min(len(target), len(self._left_over))
        target[:count] = self._left_over[:count]
        self._left_over = self._left_over[count:]
        return count

    def _unpack_whole(self, target: memoryview) -> int:
        """Unpack the frames that fit into the target whole; returns how many bytes that were."""
        jobs = []
        done = 0
        while self._next < len(self._packed.frames):
            end = done + self._packed.frames[self._next].unpacked_bytes
            if end > len(target):
                break
            jobs.append((self._next, target[done:end]))
            self._next += 1
            done = end
        self._packed.unpack_frames(self._codec, jobs, self._executor(), self._rest)
        return done


def _mapped(descriptor: int, num_bytes: int) -> memoryview:
    """The file's bytes, to be read; closes the descriptor."""
    try:
        return memoryview(mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)
