"""Accounting of the pages of one device's pool: which are free, and how many holders each other page has.

A page is a number; what lies in it is its holders' affair. Invariant: a page is on the free list exactly if nobody
holds it.
"""

from __future__ import annotations

from collections.abc import Iterable

from rekindle.errors import InternalError


class PagePool:
    """Pages `0 .. num_pages - 1`, all free at first."""

    def __init__(self, num_pages: int) -> None:
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_holders(self, page: int) -> int:
        return self._holders[page]

    def allocate(self, num_pages: int) -> tuple[int, ...] | None:
        """Take free pages, each with one holder; None, and nothing taken, if there are too few."""
        first = len(self._free) - num_pages
        if first < 0:
            return None
        pages = tuple(reversed(self._free[first:]))
        del self._free[first:]
        for page in pages:
            self._holders[page] = 1
        return pages

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
            self._free.append(page)
        return left

    def release_all(self, pages: Iterable[int]) -> None:
        """Take one holder from each page."""
        for page in pages:
            self.release(page)

    def check_integrity(self) -> None:
        """Raise InternalError unless the free list holds each unheld page exactly once."""
        unheld = [page for page, holders in enumerate(self._holders) if holders == 0]
        if sorted(self._free) != unheld:
            raise InternalError(f"the free list holds {sorted(self._free)}, but the unheld pages are {unheld}")
