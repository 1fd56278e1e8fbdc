"""Which adapter versions the replicas know, and who still needs them.

A version is leased by every request that runs on it. It is made known to the replica with its first lease and
forgotten when it is no longer the version of any name and its last lease has ended: requests in flight finish on the
version they began with. Whoever takes a version's name away retires it; a version that came with a request, which may
have lost its name since the request looked it up, is compared with the names once, when it is first without leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rekindle.gateway.seams import Catalog, RegisteredAdapter, ServedBase
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest


@dataclass(slots=True)
class _Version:
    """One version's standing with its replica. `named` once a name was seen to stand for it, so that it will be retired
    when it loses the name. The lock orders telling the replica of it and taking it back."""

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
        self._versions: dict[AdapterDigest, _Version] = {}

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
        version = self._versions.setdefault(digest, _Version())
        version.num_leases += 1
        try:
            await self._make_known(version, base, adapter.manifest, adapter.path)
            yield
        finally:
            version.num_leases -= 1
            if not (version.num_leases or version.named or version.retired):
                await self._look_for_name(version, digest)
            await self._forget_if_unused(version, base, digest)

    async def announce(self, base: ServedBase, manifest: AdapterManifest, path: Path) -> None:
        """Make a version known before a name stands for it, so that a refusal reaches who registers it.

        Raises:
            RekindleError: the replica could not take it.
        """
        version = self._versions.setdefault(manifest.digest, _Version())
        version.named, version.retired = True, False
        await self._make_known(version, base, manifest, path)

    async def retire_unless_named(self, base: ServedBase, manifest: AdapterManifest) -> None:
        """A name stands for this version no longer: forget it as soon as it is unused, unless another name does."""
        version = self._versions.get(manifest.digest)
        if version is not None:
            await self._look_for_name(version, manifest.digest)
            await self._forget_if_unused(version, base, manifest.digest)

    async def _look_for_name(self, version: _Version, digest: AdapterDigest) -> None:
        adapters = await asyncio.to_thread(self._catalog.adapters)
        version.named = any(adapter.manifest.digest == digest for adapter in adapters)
        version.retired = not version.named

    async def _make_known(self, version: _Version, base: ServedBase, manifest: AdapterManifest, path: Path) -> None:
        async with version.lock:
            if not version.known:
                await base.replica.add_adapter(manifest, path)
                version.known = True

    async def _forget_if_unused(self, version: _Version, base: ServedBase, digest: AdapterDigest) -> None:
        if not version.is_unused():
            return
        async with version.lock:
            if version.is_unused() and version.known:
                await base.replica.remove_adapter(digest)
                version.known = False
        if version.is_unused() and self._versions.get(digest) is version:
            del self._versions[digest]
