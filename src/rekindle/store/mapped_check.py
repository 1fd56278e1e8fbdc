"""Brings ranges of a mapped file into the page cache, and compares them with the file's checksums, beside their use.

What a mapping shows is as good as what was compared while the page cache holds it. Pages that the kernel drops later
and reads again are not compared again.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from rekindle.closing import Closing
from rekindle.store.reading import Verifier
from rekindle.units import KIB, MIB

_CHUNK_BYTES = 4 * MIB
"""Of files without checksums."""
_AHEAD_BYTES = 128 * KIB
"""The least that any device lets the kernel read ahead at a call; longer calls are cut to what it allows."""


class MappedCheck(Closing):
    """Looks at the ranges of `mapping`, all of the file at `path`, that are added, in `num_threads` threads of its own.

    With `reads_ahead` the page cache is asked for each chunk as a whole first, which is quicker than faults where it
    lacks them. Without a `verifier` this is all that is done. Methods belong to one thread.
    """

    def __init__(
        self, path: Path, mapping: memoryview, num_threads: int, verifier: Verifier | None, *, reads_ahead: bool
    ) -> None:
        self._mapping, self._verifier = mapping, verifier
        self._chunk_bytes = _CHUNK_BYTES if verifier is None else verifier.chunk_bytes
        self._looked_at: dict[int, Future[None]] = {}
        with ExitStack() as resources:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if reads_ahead else None
            if self._descriptor is not None:
                resources.callback(os.close, self._descriptor)
            self._threads = ThreadPoolExecutor(num_threads, "rekindle-check")
            resources.callback(self._threads.shutdown, cancel_futures=True)
            self._resources = resources.pop_all()

    def add(self, begin: int, end: int) -> None:
        """Look at the chunks of a range that have not been looked at, when those before are done."""
        if self._verifier is None and self._descriptor is None:
            return
        for chunk in range(begin - begin % self._chunk_bytes, end, self._chunk_bytes):
            if chunk not in self._looked_at:
                self._looked_at[chunk] = self._threads.submit(self._look_at, chunk)

    def wait(self) -> None:
        """Return when all chunks are as they must be.

        Raises:
            StoredFileDamaged: one is not.
        """
        for future in self._looked_at.values():
            future.result()

    def close(self) -> None:
        """Leave the rest and end the threads."""
        self._resources.close()

    def _look_at(self, begin: int) -> None:
        end = min(begin + self._chunk_bytes, len(self._mapping))
        if self._descriptor is not None:
            for position in range(begin, end, _AHEAD_BYTES):
                length = min(end - position, _AHEAD_BYTES)
                os.posix_fadvise(self._descriptor, position, length, os.POSIX_FADV_WILLNEED)
        if self._verifier is not None:
            self._verifier.verify(begin, self._mapping[begin:end])
