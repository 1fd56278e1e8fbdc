"""Full pages of keys and values that can be used again by a sequence that begins with the same tokens.

A page is found by a digest of everything its contents depend on: base model, adapter version, tenant and all tokens
up to its end, chained page by page. The cache is one holder of each page in it; sequences that use the page are the
others. A page without such users is idle and may be evicted.

Invariant: a user of a page also uses the cached pages before it. Pages are therefore given back last page first, a
page goes idle before the pages it follows, and evicting in the order of going idle removes leaves before parents.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b

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


class PrefixCache:
    """Cached pages by digest, and the idle ones in the order of their last use."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._idle_since: dict[int, int] = {}

    @property
    def num_cached(self) -> int:
        return len(self._digest_of)

    @property
    def num_idle(self) -> int:
        return len(self._idle_since)

    @property
    def cached_pages(self) -> Iterable[int]:
        return self._digest_of.keys()

    @property
    def oldest_idle_since(self) -> int | None:
        """The moment of the last use of the page that `evict_oldest` would take."""
        return next(iter(self._idle_since.values()), None)

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
        return sum(page in self._idle_since for page in pages)

    def use(self, pages: Iterable[int]) -> None:
        """Become a user of cached pages, which are a whole prefix of a chain."""
        for page in pages:
            self._pool.retain(page)
            self._idle_since.pop(page, None)

    def insert(self, digest: bytes, page: int) -> bool:
        """Cache a page that its only user has filled and will not write again.

        Returns False, and changes nothing, if another page holds the same content. The user must then not insert the
        pages after it: they would hang from a page that it does not use.
        """
        if digest in self._page_of:
            return False
        self._page_of[digest] = page
        self._digest_of[page] = digest
        self._pool.retain(page)
        return True

    def release(self, pages: Sequence[int], now: int) -> None:
        """Stop using pages, cached or not, given in the order of their positions. `now` never falls."""
        for page in reversed(pages):
            left = self._pool.release(page)
            if left == 1 and page in self._digest_of:
                self._idle_since[page] = now

    def evict_oldest(self) -> None:
        """Free the idle page whose last use is longest ago.

        Raises:
            InternalError: no page is idle.
        """
        page = next(iter(self._idle_since), None)
        if page is None:
            raise InternalError("no cached page is idle: nothing can be evicted from the prefix cache")
        del self._idle_since[page]
        del self._page_of[self._digest_of.pop(page)]
        self._pool.release(page)

    def check_integrity(self) -> None:
        """Raise InternalError unless the two indexes agree and exactly the pages without users are idle."""
        if {page: digest for digest, page in self._page_of.items()} != self._digest_of:
            raise InternalError("the prefix cache's indexes by digest and by page disagree")
        unused = {page for page in self._digest_of if self._pool.num_holders(page) == 1}
        if unused != self._idle_since.keys():
            raise InternalError(f"cached pages {sorted(unused)} have no user, but {sorted(self._idle_since)} are idle")
