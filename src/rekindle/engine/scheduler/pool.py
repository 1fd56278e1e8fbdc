"""Accounting of the pages of one device's pool: which are free, and how many holders each other page has.

A page is a number; what lies in it is its holders' affair. Invariant: a page is marked free exactly if nobody holds
it.

Single pages are taken from the end of the pool and rows of adjacent pages from its start, so that the one kind seldom
breaks up the room for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rekindle.errors import InternalError

_FREE = b"\1"


class PagePool:
    """Pages `0 .. num_pages - 1`, all free at first."""

    def __init__(self, num_pages: int) -> None:
        self._holders = [0] * num_pages
        self._free = bytearray(_FREE * num_pages)
        self._num_free = num_pages

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        return self._num_free

    def num_holders(self, page: int) -> int:
        return self._holders[page]

    def allocate(self, num_pages: int) -> tuple[int, ...] | None:
        """Take free pages, each with one holder; None, and nothing taken, if there are too few."""
        if self._num_free < num_pages:
            return None
        end = len(self._free)
        return self._take([end := self._free.rfind(_FREE, 0, end) for _ in range(num_pages)])

    def allocate_row(self, num_pages: int) -> tuple[int, ...] | None:
        """`allocate`, but adjacent pages in rising order if there are so many in a row, and rising ones otherwise."""
        if self._num_free < num_pages:
            return None
        first = self._free.find(_FREE * num_pages)
        if first >= 0:
            return self._take(range(first, first + num_pages))
        page = -1
        return self._take([page := self._free.find(_FREE, page + 1) for _ in range(num_pages)])

    def _take(self, pages: Sequence[int]) -> tuple[int, ...]:
        for page in pages:
            self._holders[page] = 1
            self._free[page] = 0
        self._num_free -= len(pages)
        return tuple(pages)

    def retain(self, page: int) -> None:
        """Add a holder to a page that has one.

        Raises:
            InternalError: the page is free.
        """
        if self._holders[page] == 0:
            raise InternalError(f"page {page} is free and cannot be shared; allocate it first")
        self._holders[page] += 1

    def release(self, page: int) -> int:
        """Take one holder from a page and return how many are left; with none left the page is free.

        Raises:
            InternalError: the page is free already.
        """
        left = self._holders[page] - 1
        if left < 0:
            raise InternalError(f"page {page} was released more often than it was held")
        self._holders[page] = left
        if left == 0:
            self._free[page] = _FREE[0]
            self._num_free += 1
        return left

    def release_all(self, pages: Iterable[int]) -> None:
        """Take one holder from each page."""
        for page in pages:
            self.release(page)

    def check_integrity(self) -> None:
        """Raise InternalError unless exactly the unheld pages are free, and counted."""
        unheld = [page for page, holders in enumerate(self._holders) if holders == 0]
        free = [page for page, is_free in enumerate(self._free) if is_free]
        if free != unheld or len(free) != self._num_free:
            raise InternalError(f"{self._num_free} pages are counted as free, {free} are marked, {unheld} are unheld")
