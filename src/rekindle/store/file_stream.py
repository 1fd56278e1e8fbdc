"""Reads a file from front to back through memory that does not grow with it.

The memory is a ring: while one part of it is used, what follows in the file is read into the rest. Bytes are given out
in order, as soon as they are there, and are gone when those well behind them are asked for. Small ranges that are
wanted at another time than when they pass by are put aside.

Knows nothing of what files hold.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.store.reading import FileRead, Verifier

Range = tuple[int, int]
"""The first byte of a file's range and the one behind its last."""

_PARTS = 4
"""Of the ring; one at a time is given up."""


class FileStream:
    """The file at `path` from the chunk that holds byte `begin` on. It is being read when this returns, and until
    `close`.

    `ring` is at least two chunks long, of the verifier's or else the profile's size, and page-aligned so that reads are
    direct. `before_reuse` is called before any of it is overwritten or given up, for users that go on reading bytes
    after they have asked for the next. `aside` are ranges that `taken` gives once they have passed.

    All methods but `close` raise StoredFileDamaged and OSError as `FileRead` does. They belong to one thread.
    """

    def __init__(
        self,
        path: Path,
        begin: int,
        ring: memoryview,
        *,
        aside: Sequence[Range] = (),
        profile: StorageProfile = DEFAULT_PROFILE,
        verifier: Verifier | None = None,
        before_reuse: Callable[[], None] = lambda: None,
    ) -> None:
        chunk_bytes = profile.chunk_bytes if verifier is None else verifier.chunk_bytes
        self._origin = self._arrived = self._released = begin - begin % chunk_bytes
        self._part_bytes = max(len(ring) // chunk_bytes // _PARTS, 1) * chunk_bytes
        self._ring, self._before_reuse = ring, before_reuse
        self._awaited = deque(sorted(it for it in aside if it[0] >= self._origin))
        self._put_aside: dict[Range, bytearray] = {}
        self._read = FileRead(path, ring, offset=self._origin, profile=profile, verifier=verifier, is_ring=True)
        self._arrivals = iter(self._read)

    def reaches(self, position: int) -> bool:
        """Whether that byte is neither gone nor so far ahead that much would be read for nothing before it."""
        return self._released <= position < self._released + len(self._ring)

    def pieces(self, begin: int, end: int, unit_bytes: int) -> Iterator[memoryview]:
        """A range that begins where the stream `reaches`, in pieces that are multiples of `unit_bytes` long, or end at
        `end`; each may be read until the next one is asked for."""
        while begin < end:
            there = self._there(begin, min(begin + unit_bytes, end))[: end - begin]
            length = len(there) if begin + len(there) == end else len(there) - len(there) % unit_bytes
            piece = there[:length] if length else self._joined(begin, min(begin + unit_bytes, end))
            yield piece
            begin += len(piece)

    def taken(self, wanted: Range) -> bytearray | None:
        """A range that was to be put aside, for the first who asks, waiting for it if it is being read; else None."""
        while self._arrived < wanted[1] <= self._released + len(self._ring):
            self._await_more()
        return self._put_aside.pop(wanted, None) if wanted[1] <= self._arrived else None

    def close(self) -> None:
        """End the read and return when no memory is used any more."""
        self._read.close()
        self._before_reuse()

    def _there(self, begin: int, end: int) -> memoryview:
        """What is there from `begin` on, at least up to `end` or to where the ring's memory ends; what lies well before
        `begin` is given up."""
        while self._arrived <= begin:
            self._give_up_before(min(begin, self._arrived))
            self._await_more()
        self._give_up_before(begin)
        place = (begin - self._origin) % len(self._ring)
        lap_end = begin - place + len(self._ring)
        while self._arrived < min(end, lap_end):
            self._await_more()
        return self._ring[place : place + min(self._arrived, lap_end) - begin]

    def _joined(self, begin: int, end: int) -> memoryview:
        """A copy of a range of which the ring has an end at either end of its memory, or that it has no room for."""
        joined = bytearray()
        while len(joined) < end - begin:
            joined += self._there(begin + len(joined), end)[: end - begin - len(joined)]
        return memoryview(joined)

    def _give_up_before(self, position: int) -> None:
        passed = (position - self._released) // self._part_bytes * self._part_bytes
        if passed > 0:
            self._before_reuse()
            self._released += passed
            self._read.release(self._released - self._origin)

    def _await_more(self) -> None:
        """Wait until more bytes are there than were, and put aside what of them is to be."""
        before, self._arrived = self._arrived, self._origin + next(self._arrivals)
        while self._awaited and (wanted := self._awaited[0])[0] < self._arrived:
            begin, end = max(wanted[0], before), min(wanted[1], self._arrived)
            place = (begin - self._origin) % len(self._ring)
            self._put_aside.setdefault(wanted, bytearray()).extend(self._ring[place : place + end - begin])
            if self._arrived < wanted[1]:
                return
            self._awaited.popleft()
