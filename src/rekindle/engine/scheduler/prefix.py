"""Full pages of keys and values that can be used again by a sequence that begins with the same tokens.

A page is found by a digest of everything its contents depend on: base model, adapter version, tenant and all tokens
up to its end, chained page by page. The cache is one holder of each page in it; sequences that use the page are the
others. A page without such users is idle and may be evicted, once no cached page follows it.

Invariant: a user of a page also uses the cached pages before it, so a page that is idle is followed by idle ones only.
Each end of a use warms the whole chain, so what many prompts share outlives what follows it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heappop, heappush

from rekindle.engine.scheduler.eviction import COLD, EvictionOrder, ReuseShare, warmth_after_use
from rekindle.engine.scheduler.pool import PagePool
from rekindle.errors import InternalError
from rekindle.protocol.identity import AdapterDigest, ModelDigest

_DIGEST_BYTES = 32
_LENGTH_BYTES = 8


def root_digest(base: ModelDigest, adapter: AdapterDigest | None, tenant_salt: str) -> bytes:
    """The start of a chain. Each field is preceded by its length, and an absent adapter differs from an empty name."""
    hasher = blake2b(digest_size=_DIGEST_BYTES, person=b"kv-prefix-root")
    for text in (base, "base" if adapter is None else "adapter", adapter or "", tenant_salt):
        field = text.encode("utf-8", "surrogatepass")
        hasher.update(len(field).to_bytes(_LENGTH_BYTES, "little"))
        hasher.update(field)
    return hasher.digest()


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The chain's next link: a full page of tokens after `parent`."""
    hasher = blake2b(parent, digest_size=_DIGEST_BYTES, person=b"kv-prefix-page")
    hasher.update(array("q", token_ids).tobytes())
    return hasher.digest()


@dataclass(slots=True)
class _CachedPage:
    """`parent` is the page before it in the chain, `num_children` counts the cached pages that follow."""

    digest: bytes
    parent: int | None
    num_children: int = 0
    warmth: float = COLD


class PrefixCache:
    """Cached pages by digest, and the order in which the idle ones may go."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._cached: dict[int, _CachedPage] = {}
        self._idle: set[int] = set()
        self._idle_leaves: EvictionOrder[int] = EvictionOrder()
        self.reuse = ReuseShare()

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def cached_pages(self) -> Iterable[int]:
        return self._cached.keys()

    def match(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """The cached pages of the longest known prefix of a chain. They are not held: `use` them before evicting."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def count_idle(self, pages: Iterable[int]) -> int:
        return sum(page in self._idle for page in pages)

    def use(self, pages: Collection[int]) -> None:
        """Become a user of cached pages, which are a whole prefix of a chain."""
        self.reuse.note(0, len(pages))
        for page in pages:
            self._pool.retain(page)
            self._idle.discard(page)
            self._idle_leaves.discard(page)

    def insert(self, digest: bytes, page: int, parent: int | None) -> bool:
        """Cache a page that its only user has filled and will not write again; `parent` is the page before it.

        Returns False, and changes nothing, if another page holds the same content. The user must then not insert the
        pages after it: they would hang from a page that it does not use.
        """
        if digest in self._page_of:
            return False
        self.reuse.note(1, 0)
        self._page_of[digest] = page
        self._cached[page] = _CachedPage(digest, parent)
        if parent is not None:
            self._cached[parent].num_children += 1
        self._pool.retain(page)
        return True

    def release(self, pages: Sequence[int], now_s: float) -> None:
        """Stop using pages, cached or not, given in the order of their positions."""
        for page in reversed(pages):
            left = self._pool.release(page)
            cached = self._cached.get(page)
            if cached is not None:
                cached.warmth = warmth_after_use(cached.warmth, now_s)
                if left == 1:
                    self._set_idle(page, cached)

    def in_order(self) -> Iterator[tuple[float, int]]:
        """(warmth, page) of the idle pages, coldest first but each after those that follow it: the order in which they
        may be evicted. Nothing may change meanwhile."""
        num_gone: Counter[int] = Counter()
        exposed: list[tuple[float, int]] = []
        leaves = self._idle_leaves.in_order()
        leaf = next(leaves, None)
        while leaf is not None or exposed:
            if leaf is None or (exposed and exposed[0][0] < leaf[0]):
                warmth, page = heappop(exposed)
            else:
                (warmth, page), leaf = leaf, next(leaves, None)
            yield warmth, page
            parent = self._cached[page].parent
            if parent is not None:
                num_gone[parent] += 1
                if parent in self._idle and num_gone[parent] == self._cached[parent].num_children:
                    heappush(exposed, (self._cached[parent].warmth, parent))

    def evict(self, page: int) -> None:
        """Free an idle page that no cached page follows.

        Raises:
            InternalError: it is not such a page.
        """
        if page not in self._idle_leaves:
            raise InternalError(f"page {page} is no idle leaf of the prefix cache and cannot be evicted")
        self._idle_leaves.discard(page)
        self._idle.discard(page)
        cached = self._cached.pop(page)
        del self._page_of[cached.digest]
        if cached.parent is not None:
            parent = self._cached[cached.parent]
            parent.num_children -= 1
            if cached.parent in self._idle:
                self._set_idle(cached.parent, parent)
        self._pool.release(page)

    def check_integrity(self) -> None:
        """Raise InternalError unless the indexes agree and exactly the pages without users are idle."""
        if {page: digest for digest, page in self._page_of.items()} != {p: it.digest for p, it in self._cached.items()}:
            raise InternalError("the prefix cache's indexes by digest and by page disagree")
        unused = {page for page in self._cached if self._pool.num_holders(page) == 1}
        if unused != self._idle:
            raise InternalError(f"cached pages {sorted(unused)} have no user, but {sorted(self._idle)} are idle")
        num_children = Counter(it.parent for it in self._cached.values() if it.parent is not None)
        if any(it.num_children != num_children[page] for page, it in self._cached.items()):
            raise InternalError(f"cached pages are followed by {num_children}, but other numbers are on record")
        leaves = {page for page in self._idle if not num_children[page]}
        if leaves != set(self._idle_leaves):
            raise InternalError(f"idle pages {sorted(leaves)} have no page after them and are not all up for eviction")

    def _set_idle(self, page: int, cached: _CachedPage) -> None:
        self._idle.add(page)
        if not cached.num_children:
            self._idle_leaves.set(page, cached.warmth)
