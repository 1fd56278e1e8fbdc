"""Which adapter versions a replica knows, and which of them lie in the page pool.

Only the accounting: the bytes are read by whoever carries out an `AdapterLoad`. A version is pinned by every sequence
that runs with it and referenced by every unfinished one. A ready version without pins is idle: it stays until its
pages are needed. While an unfinished sequence refers to it, an idle version is awaited. A removed version is forgotten
with its last reference.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto

from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.eviction import COLD, EvictionOrder, ReuseShare, log_price, warmth_after_use
from rekindle.engine.scheduler.plan import AdapterLoad
from rekindle.engine.scheduler.pool import PagePool
from rekindle.errors import AdapterRejected, InternalError, NotFound
from rekindle.policy.load_estimates import LoadEstimates
from rekindle.policy.load_queue import LoadQueue, LoadTiming
from rekindle.protocol.adapters import ADAPTER_LAYOUT, AdapterManifest
from rekindle.protocol.estimates import DISK_TO_DEVICE
from rekindle.protocol.identity import AdapterDigest

_PRICE_TOLERANCE = 0.25
"""By how much a fitted cost may move before idle versions are put in order anew, which takes all of them."""


class Residency(Enum):
    """Where a version's bytes are: not in the pool, on their way into it, or there."""

    ABSENT = auto()
    LOADING = auto()
    READY = auto()


@dataclass(slots=True)
class _Version:
    manifest: AdapterManifest
    path: str
    num_bytes: int
    num_pages: int
    residency: Residency = Residency.ABSENT
    pages: tuple[int, ...] = ()
    num_pins: int = 0
    num_references: int = 0
    is_removed: bool = False
    warmth: float = COLD


class AdapterCache:
    """Adapter versions by digest. `idle` and `awaited` are the idle versions nobody waits for and those somebody does,
    in the order of their value: see `eviction`."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, estimates: LoadEstimates) -> None:
        self._config = config
        self._pool = pool
        self._versions: dict[AdapterDigest, _Version] = {}
        self.idle: EvictionOrder[AdapterDigest] = EvictionOrder()
        self.awaited: EvictionOrder[AdapterDigest] = EvictionOrder()
        self.reuse = ReuseShare()
        self.loads: LoadQueue[AdapterDigest] = LoadQueue(estimates)
        self._evicted: list[AdapterDigest] = []
        self._num_pages_used = 0
        self._prices = self._load_prices()

    @property
    def num_pages_used(self) -> int:
        """Pages of all versions loading or ready."""
        return self._num_pages_used

    @property
    def resident(self) -> tuple[AdapterDigest, ...]:
        return tuple(key for key, version in self._versions.items() if version.residency is Residency.READY)

    @property
    def pages_in_use(self) -> tuple[int, ...]:
        return tuple(page for version in self._versions.values() for page in version.pages)

    def bytes_by_use(self) -> tuple[int, int, int]:
        """Bytes of the versions that sequences run with, of those loading, and of the idle ones; without the tails of
        their last pages."""
        in_use = loading = idle = 0
        for version in self._versions.values():
            if version.residency is Residency.LOADING:
                loading += version.num_bytes
            elif version.num_pins:
                in_use += version.num_bytes
            elif version.residency is Residency.READY:
                idle += version.num_bytes
        return in_use, loading, idle

    def add(self, manifest: AdapterManifest, path: str) -> None:
        """Make a version known; adding it again, even after its removal, keeps what is known of it. `path` is handed to
        whoever carries out its loads.

        Raises:
            AdapterRejected: it belongs to another base model, or is stored in a layout of an earlier version.
        """
        if manifest.base != self._config.base:
            raise AdapterRejected(
                f"adapter {manifest.digest} was made for base {manifest.base}, but this replica serves "
                f"{self._config.base}; register it with its own base",
                field="base_model",
            )
        if manifest.layout != ADAPTER_LAYOUT:
            raise AdapterRejected(
                f"adapter {manifest.digest} was stored in layout {manifest.layout}, this version of Rekindle reads "
                f"layout {ADAPTER_LAYOUT}; add it again from its PEFT directory"
            )
        num_bytes = manifest.num_elements * self._config.element_bytes
        version = self._versions.setdefault(
            manifest.digest, _Version(manifest, path, num_bytes, -(-num_bytes // self._config.page_bytes))
        )
        version.path, version.is_removed = path, False

    def remove(self, digest: AdapterDigest) -> None:
        """Refuse the version to new sequences and forget it with its last reference; unknown ones are ignored."""
        version = self._versions.get(digest)
        if version is not None:
            version.is_removed = True
            self._forget_if_done(version)

    def num_pages_of(self, digest: AdapterDigest) -> int:
        return self._versions[digest].num_pages

    def seconds_to_load(self, digest: AdapterDigest, now_s: float) -> float:
        """How long a load begun now is likely to take, after those under way."""
        before_s = max(self.loads.seconds_left(now_s).values(), default=0.0)
        return before_s + self.load_s(digest)

    def load_s(self, digest: AdapterDigest) -> float:
        """How long a load is likely to take by itself."""
        return self.loads.estimates[DISK_TO_DEVICE].seconds(self._versions[digest].num_bytes)

    def residency(self, digest: AdapterDigest) -> Residency:
        return self._versions[digest].residency

    def require(self, digest: AdapterDigest) -> None:
        """Raise NotFound unless new sequences may use the version."""
        version = self._versions.get(digest)
        if version is None or version.is_removed:
            state = "unknown here" if version is None else "removed"
            raise NotFound(
                f"adapter version {digest} is {state}; register it, or ask for one that is served",
                field="model",
                code="model_not_found",
            )

    def reference(self, digest: AdapterDigest, now_s: float) -> None:
        """Count an unfinished sequence, which is a use of the version."""
        version = self._versions[digest]
        version.num_references += 1
        self.reuse.note(*((1, 0) if version.warmth == COLD else (0, 1)))
        version.warmth = warmth_after_use(version.warmth, now_s)
        self._place(version)

    def unreference(self, digest: AdapterDigest) -> None:
        version = self._versions[digest]
        version.num_references -= 1
        self._place(version)
        self._forget_if_done(version)

    def pin(self, digest: AdapterDigest) -> None:
        """Keep a ready version in its pages while a sequence runs with it."""
        version = self._versions[digest]
        if version.residency is not Residency.READY:
            raise InternalError(f"adapter {digest} is {version.residency.name} and cannot be run with")
        version.num_pins += 1
        self._place(version)

    def unpin(self, digest: AdapterDigest) -> None:
        version = self._versions[digest]
        version.num_pins -= 1
        self._place(version)
        self._forget_if_done(version)

    def begin_load(self, digest: AdapterDigest, pages: tuple[int, ...], now_s: float) -> AdapterLoad:
        """Hand `pages` to an absent version; they are its own until it is evicted or its load fails."""
        version = self._versions[digest]
        if version.residency is not Residency.ABSENT or len(pages) != version.num_pages:
            raise InternalError(
                f"adapter {digest} is {version.residency.name} and takes {version.num_pages} pages; "
                f"a load into {len(pages)} makes no sense"
            )
        version.residency = Residency.LOADING
        version.pages = pages
        self._num_pages_used += len(pages)
        self.loads.begin(digest, DISK_TO_DEVICE, version.num_bytes, now_s)
        return AdapterLoad(version.manifest, version.path, pages)

    def end_load(self, digest: AdapterDigest, now_s: float, timing: LoadTiming | None = None) -> None:
        """The version's bytes are in its pages; `timing` is known where the load was timed."""
        version = self._loading(digest)
        self.loads.end(digest, now_s, succeeded=True, timing=timing)
        version.residency = Residency.READY
        self._place(version)
        self._reprice()
        self._forget_if_done(version)

    def fail_load(self, digest: AdapterDigest, now_s: float, timing: LoadTiming | None = None) -> None:
        """The version's bytes will not come; it is absent again and its pages are free."""
        version = self._loading(digest)
        self.loads.end(digest, now_s, succeeded=False, timing=timing)
        self._give_pages_back(version)
        self._forget_if_done(version)

    def num_pages_idle(self, keep: Collection[AdapterDigest]) -> int:
        """Pages that evicting every idle version outside `keep`, whose versions somebody waits for, would free."""
        kept = sum(self.awaited.num_pages_of(digest) for digest in keep)
        return self.idle.num_pages + self.awaited.num_pages - kept

    def value(self, digest: AdapterDigest, warmth: float) -> float:
        """The logarithm of what keeping the version is worth, a byte, at a warmth."""
        version = self._versions[digest]
        return log_price(self.load_s(digest), version.num_pages * self._config.page_bytes) + warmth

    def evict(self, digest: AdapterDigest) -> None:
        """Free the pages of an idle version.

        Raises:
            InternalError: it is not idle.
        """
        if digest not in self.idle and digest not in self.awaited:
            raise InternalError(f"adapter {digest} is not idle and cannot be evicted")
        self._evict(self._versions[digest])

    def take_evicted(self) -> tuple[AdapterDigest, ...]:
        """The versions that have left their pages since the last call."""
        evicted = tuple(self._evicted)
        self._evicted.clear()
        return evicted

    def check_integrity(self) -> None:
        """Raise InternalError unless the counts agree with the versions."""
        versions = self._versions
        idle = {key for key, it in versions.items() if it.residency is Residency.READY and it.num_pins == 0}
        awaited = {key for key in idle if versions[key].num_references}
        if awaited != set(self.awaited) or idle - awaited != set(self.idle):
            raise InternalError(
                f"adapters {sorted(idle)} have no pins and {sorted(awaited)} of them are awaited, but "
                f"{sorted(self.idle)} and {sorted(self.awaited)} are on record"
            )
        counted = (len(self.pages_in_use), sum(versions[digest].num_pages for digest in idle))
        recorded = (self._num_pages_used, self.idle.num_pages + self.awaited.num_pages)
        if counted != recorded:
            raise InternalError(f"adapters use {counted[0]} pages, {counted[1]} of them idle, but {recorded} are known")

    def _loading(self, digest: AdapterDigest) -> _Version:
        version = self._versions.get(digest)
        if version is None or version.residency is not Residency.LOADING:
            raise InternalError(f"the end of a load of adapter {digest} was reported, but none is under way")
        return version

    def _place(self, version: _Version) -> None:
        """Put a version into the order that it belongs to, if it is idle."""
        digest = version.manifest.digest
        self.idle.discard(digest)
        self.awaited.discard(digest)
        if version.residency is Residency.READY and version.num_pins == 0:
            order = self.awaited if version.num_references else self.idle
            order.set(digest, self.value(digest, version.warmth), version.num_pages)

    def _reprice(self) -> None:
        """Order idle versions anew if loads turn out to cost otherwise than when they were put in order."""
        prices = self._load_prices()
        if any(abs(new - old) > _PRICE_TOLERANCE * old for new, old in zip(prices, self._prices, strict=True)):
            self._prices = prices
            for digest in (*self.idle, *self.awaited):
                self._place(self._versions[digest])

    def _load_prices(self) -> tuple[float, float]:
        """Seconds of any load, and of each byte."""
        model = self.loads.estimates[DISK_TO_DEVICE]
        return model.fixed_s, 1 / model.bytes_per_s

    def _forget_if_done(self, version: _Version) -> None:
        if not version.is_removed or version.num_references or version.num_pins:
            return
        if version.residency is Residency.LOADING:
            return
        if version.residency is Residency.READY:
            self._evict(version)
        del self._versions[version.manifest.digest]

    def _evict(self, version: _Version) -> None:
        self._evicted.append(version.manifest.digest)
        self._give_pages_back(version)

    def _give_pages_back(self, version: _Version) -> None:
        self._pool.release_all(version.pages)
        self._num_pages_used -= len(version.pages)
        version.pages = ()
        version.residency = Residency.ABSENT
        self._place(version)
