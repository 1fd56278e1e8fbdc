"""Which adapter versions the replicas know, and who still needs them.

A version is leased by every request that runs on it. It is made known to the replica with its first lease and
forgotten when it is no longer the version of any name and its last lease has ended: requests in flight finish on the
version they began with. Whoever takes a version's name away retires it; a version that came with a request, which may
have lost its name since the request looked it up, is compared with the names once, when it is first without leases.

Names may be many more than versions in use. Beyond `MAX_IDLE_VERSIONS` the versions whose last lease is longest ago
and that are not in device memory are forgotten, too, here and by their replicas, until a request needs them again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rekindle.gateway.seams import Catalog, RegisteredAdapter, ServedBase
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest

MAX_IDLE_VERSIONS = 1024
"""Versions known without being leased or resident; each takes about 70 kB here and as much in its engine."""


@dataclass(slots=True)
class _Version:
    """One version's standing with its replica. `named` once a name was seen to stand for it, so that it will be retired
    when it loses the name. The lock orders telling the replica of it and taking it back."""

    base: ServedBase
    num_leases: int = 0
    known: bool = False
    named: bool = False
    retired: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def is_unused(self) -> bool:
        return not self.num_leases and (self.retired or not self.known)


class AdapterVersions:
    """Leases on adapter versions; used from the server's event loop only."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._versions: OrderedDict[AdapterDigest, _Version] = OrderedDict()
        self._trim_above = MAX_IDLE_VERSIONS

    def __len__(self) -> int:
        """Versions on record."""
        return len(self._versions)

    def num_leases(self, digest: AdapterDigest) -> int:
        """Requests that run on this version now."""
        version = self._versions.get(digest)
        return version.num_leases if version else 0

    @asynccontextmanager
    async def lease(self, base: ServedBase, adapter: RegisteredAdapter) -> AsyncIterator[None]:
        """Keep the version with the base's replica while the context lasts.

        Raises:
            RekindleError: the replica could not take it.
        """
        digest = adapter.manifest.digest
        version = self._used_now(base, digest)
        version.num_leases += 1
        try:
            await self._make_known(version, adapter.manifest, adapter.path)
            yield
        finally:
            version.num_leases -= 1
            if not (version.num_leases or version.named or version.retired):
                await self._look_for_name(version, digest)
            await self._forget_if_unused(version, digest)
            await self._forget_idle()

    async def announce(self, base: ServedBase, manifest: AdapterManifest, path: Path) -> None:
        """Make a version known before a name stands for it, so that a refusal reaches who registers it.

        Raises:
            RekindleError: the replica could not take it.
        """
        version = self._used_now(base, manifest.digest)
        version.named, version.retired = True, False
        await self._make_known(version, manifest, path)
        await self._forget_idle()

    async def retire_unless_named(self, manifest: AdapterManifest) -> None:
        """A name stands for this version no longer: forget it as soon as it is unused, unless another name does."""
        version = self._versions.get(manifest.digest)
        if version is not None:
            await self._look_for_name(version, manifest.digest)
            await self._forget_if_unused(version, manifest.digest)

    def _used_now(self, base: ServedBase, digest: AdapterDigest) -> _Version:
        version = self._versions.setdefault(digest, _Version(base))
        self._versions.move_to_end(digest)
        if version.named:
            version.retired = False
        return version

    async def _look_for_name(self, version: _Version, digest: AdapterDigest) -> None:
        version.named = await asyncio.to_thread(self._catalog.is_named, digest)
        version.retired = not version.named

    async def _make_known(self, version: _Version, manifest: AdapterManifest, path: Path) -> None:
        async with version.lock:
            if not version.known:
                await version.base.replica.add_adapter(manifest, path)
                version.known = True

    async def _forget_if_unused(self, version: _Version, digest: AdapterDigest) -> None:
        if not version.is_unused():
            return
        async with version.lock:
            if version.is_unused() and version.known:
                await version.base.replica.remove_adapter(digest)
                version.known = False
        if version.is_unused() and self._versions.get(digest) is version:
            del self._versions[digest]

    async def _forget_idle(self) -> None:
        """Looks at all versions, so it waits until some have gathered since it last did."""
        if len(self._versions) <= self._trim_above:
            return
        idle = self._idle()
        for digest in idle[: max(0, len(idle) - MAX_IDLE_VERSIONS)]:
            version = self._versions.get(digest)
            if version is not None and not version.num_leases:
                version.retired = True
                await self._forget_if_unused(version, digest)
        self._trim_above = max(len(self._versions), MAX_IDLE_VERSIONS) + MAX_IDLE_VERSIONS // 8

    def _idle(self) -> list[AdapterDigest]:
        """Versions without leases that are not in device memory, those used longest ago first."""
        reports = {id(version.base): version.base.replica.stats for version in self._versions.values()}
        resident = {digest for stats in reports.values() if stats is not None for digest in stats.resident_adapters}
        return [
            digest for digest, version in self._versions.items() if not version.num_leases and digest not in resident
        ]
