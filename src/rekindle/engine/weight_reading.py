"""How the weights of one start come from their file: from the page cache, or past it.

Where the page cache holds them, and copying from it is not slower than the disk, they are used where it has them, and
threads compare them with their checksums ahead of their use. Otherwise what is passed on streams past the page cache in
the file's order, and only what is used in place, or out of order, is brought into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from rekindle.closing import Closing
from rekindle.protocol.storage import StorageProfile
from rekindle.store.checksums import Checksums, read_checksums
from rekindle.store.file_stream import FileStream, Range
from rekindle.store.mapped_check import MappedCheck
from rekindle.store.reading import aligned_buffer, check_length, resident_share
from rekindle.units import MIB

_CACHED_SHARE = 0.9
"""Of a file's pages, from which on it is taken to be in the page cache."""
_CHECK_THREADS = 2
"""For what is there already: one compares faster than one lays out, two as fast as memory gives."""
_RING_BYTES = 32 * MIB
"""Enough that the disk never waits for one chunk to be laid out; more would only be more memory to touch."""
_MIN_RING_CHUNKS = 4


class WeightReading(Closing):
    """The file at `path`, mapped as `mapping`, while tensors are taken from it for `device`. `vectors` are the ranges
    that are taken out of order and small enough to be kept until then.

    All methods raise StoredFileDamaged where something read is not what was imported, and belong to one thread.

    Raises:
        StoredFileDamaged: the checksums are damaged, or belong to a file of another length.
    """

    def __init__(
        self,
        path: Path,
        mapping: memoryview,
        vectors: Sequence[Range],
        profile: StorageProfile,
        device: torch.device,
    ) -> None:
        self._path, self._vectors, self._profile, self._device = path, vectors, profile, device
        checksums = read_checksums(path)
        if checksums is not None:
            check_length(checksums, path, len(mapping))
        self._checksums: Checksums | None = None if checksums is None else replace(checksums, name=str(path))
        self._is_cached = profile.prefers_cache and resident_share(path) >= _CACHED_SHARE
        self._stream: FileStream | None = None
        with ExitStack() as resources:
            num_threads = _CHECK_THREADS if self._is_cached else profile.num_threads
            self._check = resources.enter_context(
                MappedCheck(path, mapping, num_threads, self._checksums, reads_ahead=not self._is_cached)
            )
            if self._is_cached:
                self._check.add(0, len(mapping))
            self._resources = resources.pop_all()

    def pieces(self, begin: int, end: int, unit_bytes: int) -> Iterator[memoryview] | None:
        """A range that is passed on, as `FileStream.pieces`; None if it is to come from the mapping."""
        if self._is_cached:
            return None
        if self._stream is None:
            self._stream = self._started(begin)
        return self._stream.pieces(begin, end, unit_bytes) if self._stream.reaches(begin) else None

    def vector(self, begin: int, end: int) -> bytearray | None:
        """One of the `vectors`, if it has passed by; None if it is to come from the mapping."""
        return None if self._stream is None else self._stream.taken((begin, end))

    def add_mapped(self, begin: int, end: int) -> None:
        """A range is used from the mapping."""
        self._check.add(begin, end)

    def wait(self) -> None:
        """Return when all that was taken is known to be right."""
        self._check.wait()

    def close(self) -> None:
        """End what is still being read."""
        self._resources.close()

    def _started(self, begin: int) -> FileStream:
        chunk_bytes = self._profile.chunk_bytes if self._checksums is None else self._checksums.chunk_bytes
        ring, before_reuse = _ring(max(_RING_BYTES // chunk_bytes, _MIN_RING_CHUNKS) * chunk_bytes, self._device)
        stream = FileStream(
            self._path,
            begin,
            ring,
            aside=self._vectors,
            profile=self._profile,
            verifier=self._checksums,
            before_reuse=before_reuse,
        )
        self._resources.callback(stream.close)
        return stream


def _ring(num_bytes: int, device: torch.device) -> tuple[memoryview, Callable[[], None]]:
    """Memory to stream through, and what to call before any of it is overwritten: a GPU copies from pinned memory
    while the host goes on."""
    if device.type == "cpu":
        return memoryview(aligned_buffer(num_bytes))[:num_bytes], lambda: None
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    return pinned.numpy().data, torch.cuda.current_stream(device).synchronize
