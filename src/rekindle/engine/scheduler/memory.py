"""The one pool of pages and what is cached in it: pages are found by evicting what is idle.

Running sequences' pages and adapters are never evicted; what cannot be had here takes a preemption, which is the
scheduler's decision.
"""

from __future__ import annotations

from collections.abc import Collection

from rekindle.engine.scheduler.adapters import AdapterCache
from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.pool import PagePool
from rekindle.engine.scheduler.prefix import PrefixCache
from rekindle.errors import InternalError
from rekindle.protocol.identity import AdapterDigest


def adapter_goes_first(adapter_idle_since: int | None, prefix_idle_since: int | None) -> bool:
    """Whether the next victim is the oldest idle adapter rather than the oldest idle prefix page.

    Least recently used; of two equally old a prefix page goes, because it frees less that has to be brought back.
    """
    if adapter_idle_since is None:
        return False
    return prefix_idle_since is None or adapter_idle_since < prefix_idle_since


class PageMemory:
    """Allocation from the pool at the expense of idle prefix pages and idle adapters; counts what that evicted."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = PagePool(config.num_pages)
        self.prefix = PrefixCache(self.pool)
        self.adapters = AdapterCache(config, self.pool)
        self.num_adapters_evicted = 0
        self.num_prefix_pages_evicted = 0

    def num_available(self, keep: Collection[AdapterDigest] = ()) -> int:
        """Pages that `allocate` could give without evicting an adapter in `keep`."""
        return self.pool.num_free + self.prefix.num_idle + self.adapters.num_pages_idle(keep)

    def allocate(self, num_pages: int, keep: Collection[AdapterDigest] = ()) -> tuple[int, ...] | None:
        """Take pages, evicting what is idle as far as needed; None, and nothing evicted, if that is not enough."""
        if self.pool.num_free < num_pages:
            if self.num_available(keep) < num_pages:
                return None
            self._evict_until_free(num_pages, keep)
        return self.pool.allocate(num_pages)

    def take(self, num_pages: int, keep: Collection[AdapterDigest] = ()) -> tuple[int, ...]:
        """Allocate pages that `num_available` has promised.

        Raises:
            InternalError: they cannot be had.
        """
        pages = self.allocate(num_pages, keep)
        if pages is None:
            raise InternalError(f"{num_pages} pages were promised, but {self.num_available(keep)} can be had")
        return pages

    def check_integrity(self, users: Collection[tuple[int, ...]]) -> None:
        """Raise InternalError unless every page's holders are the given users' page tables and the two caches, and
        the cached pages of each table are its first."""
        self.pool.check_integrity()
        self.prefix.check_integrity()
        self.adapters.check_integrity()
        expected = [0] * self.pool.num_pages
        for pages in (*users, tuple(self.prefix.cached_pages), self.adapters.pages_in_use):
            for page in pages:
                expected[page] += 1
        actual = [self.pool.num_holders(page) for page in range(self.pool.num_pages)]
        if actual != expected:
            wrong = [page for page in range(self.pool.num_pages) if actual[page] != expected[page]]
            raise InternalError(f"pages {wrong} have other holders than the sequences and caches that exist")
        cached = set(self.prefix.cached_pages)
        for pages in users:
            is_cached = [page in cached for page in pages]
            if is_cached != sorted(is_cached, reverse=True):
                raise InternalError(f"in the page table {pages} a cached page follows one that is not")

    def _evict_until_free(self, num_pages: int, keep: Collection[AdapterDigest]) -> None:
        while self.pool.num_free < num_pages:
            if adapter_goes_first(self.adapters.idle_since(keep), self.prefix.oldest_idle_since):
                self.adapters.evict_oldest(keep)
                self.num_adapters_evicted += 1
            else:
                self.prefix.evict_oldest()
                self.num_prefix_pages_evicted += 1
