"""The one pool of pages and what is cached in it: pages are found by evicting what is idle.

What is worth least goes first, be it an adapter or a page of a cached prefix; see `eviction`. Idle adapters that
somebody in the queue waits to run with go last. Running sequences' pages and adapters are never evicted; what cannot
be had here takes a preemption, which is the scheduler's decision.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from heapq import merge
from operator import itemgetter
from typing import TypeAlias

from rekindle.engine.scheduler.adapters import AdapterCache
from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.eviction import log_price
from rekindle.engine.scheduler.pool import PagePool
from rekindle.engine.scheduler.prefix import PrefixCache
from rekindle.engine.scheduler.step_times import StepTimes
from rekindle.errors import InternalError
from rekindle.policy.load_estimates import LoadEstimates
from rekindle.protocol.identity import AdapterDigest

_Victim: TypeAlias = AdapterDigest | int
"""An idle adapter, or a page of the prefix cache."""
_Candidate: TypeAlias = tuple[float, int, _Victim]
"""The logarithm of its value, and the pages that it frees."""


class PageMemory:
    """Allocation from the pool at the expense of idle prefix pages and idle adapters; counts what that evicted."""

    def __init__(self, config: SchedulerConfig, times: StepTimes, loads: LoadEstimates) -> None:
        self._page_bytes, self._page_tokens = config.page_bytes, config.page_tokens
        self._times = times
        self.pool = PagePool(config.num_pages)
        self.prefix = PrefixCache(self.pool)
        self.adapters = AdapterCache(config, self.pool, loads)
        self.num_adapters_evicted = 0
        self.num_prefix_pages_evicted = 0

    def num_available(self, keep: Collection[AdapterDigest] = ()) -> int:
        """Pages that `allocate` could give without evicting an adapter in `keep`."""
        return self.pool.num_free + self.prefix.num_idle + self.adapters.num_pages_idle(keep)

    def allocate(
        self,
        num_pages: int,
        keep: Collection[AdapterDigest] = (),
        most_value: float = math.inf,
        *,
        in_a_row: bool = False,
    ) -> tuple[int, ...] | None:
        """Take pages, evicting what is idle as far as needed; None, and nothing evicted, if that is not enough.
        `most_value`, the logarithm of a value, spares what is worth more, and any adapter that somebody waits for.
        Pages `in_a_row` are adjacent if the free ones allow it."""
        if self.pool.num_free < num_pages:
            if self.num_available(keep) < num_pages:
                return None
            victims = self._victims(num_pages - self.pool.num_free, keep, most_value)
            if victims is None:
                return None
            self._evict(victims)
        return self.pool.allocate_row(num_pages) if in_a_row else self.pool.allocate(num_pages)

    def take(self, num_pages: int, keep: Collection[AdapterDigest] = (), *, in_a_row: bool = False) -> tuple[int, ...]:
        """Allocate pages that `num_available` has promised.

        Raises:
            InternalError: they cannot be had.
        """
        pages = self.allocate(num_pages, keep, in_a_row=in_a_row)
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

    def _victims(self, num_pages: int, keep: Collection[AdapterDigest], most_value: float) -> list[_Victim] | None:
        """What to evict, in that order, to free so many pages: the least valuable, less the adapters among them that a
        large one after them makes unnecessary, the most valuable of these first."""
        chosen: list[_Candidate] = []
        for candidate in self._in_order(keep):
            if num_pages <= 0:
                break
            if candidate[0] > most_value:
                return None
            chosen.append(candidate)
            num_pages -= candidate[1]
        spared = set()
        for _, num_freed, victim in reversed(chosen):
            if not isinstance(victim, int) and num_freed <= -num_pages:
                spared.add(victim)
                num_pages += num_freed
        return [victim for _, _, victim in chosen if victim not in spared]

    def _in_order(self, keep: Collection[AdapterDigest]) -> Iterator[_Candidate]:
        """All that may be evicted, least value first; adapters that somebody waits for are priceless."""
        price = log_price(self._times.prompt_token_s * self._page_tokens, self._page_bytes) + self.prefix.reuse.log
        reuse = self.adapters.reuse.log
        pages: Iterator[_Candidate] = ((price + warmth, 1, page) for warmth, page in self.prefix.in_order())
        adapters: Iterator[_Candidate] = (
            (value + reuse, self.adapters.num_pages_of(digest), digest)
            for value, digest in self.adapters.idle.in_order()
        )
        yield from merge(pages, adapters, key=itemgetter(0))
        for _, digest in self.adapters.awaited.in_order():
            if digest not in keep:
                yield math.inf, self.adapters.num_pages_of(digest), digest

    def _evict(self, victims: Iterable[_Victim]) -> None:
        for victim in victims:
            if isinstance(victim, int):
                self.prefix.evict(victim)
                self.num_prefix_pages_evicted += 1
            else:
                self.adapters.evict(victim)
                self.num_adapters_evicted += 1
