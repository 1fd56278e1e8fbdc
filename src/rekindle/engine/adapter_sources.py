"""Where an engine's adapters come from: host memory, where the tier keeps them, else their files.

The tier is told what the engine has, so that it may keep what the engine no longer does. All methods belong to the
reader thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from rekindle.clock import Clock
from rekindle.engine.vectors import AdapterVector, stored_bytes
from rekindle.errors import PackedDamaged
from rekindle.pace import Pace
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.tiers import Hold
from rekindle.store.tier_client import Copy
from rekindle.store.vector_sources import FileSource, MemorySource, PackedSource, VectorSource

Load = Callable[[VectorSource], AdapterVector]
"""Brings a vector to the device."""

_logger = logging.getLogger(__name__)


class CopyTier(Protocol):
    """The part of the host-memory tier that keeps adapters; see `store.tier_client.TierClient`."""

    def lease_copy(self, name: str) -> Copy | None: ...

    def hold(self, held: Hold) -> None: ...

    def release(self, name: str, *, is_damaged: bool = False) -> None: ...


class AdapterSources:
    """See the module. Reading keeps to `pace`; while that is quiet, all cores unpack. `disk_bytes_s` is what the disk
    that holds the files gives when nothing is cached, if that is known."""

    def __init__(
        self, pace: Pace, clock: Clock, tier: CopyTier | None = None, disk_bytes_s: float | None = None
    ) -> None:
        self._pace, self._clock, self._tier, self._disk_bytes_s = pace, clock, tier, disk_bytes_s
        self._threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "unpack")

    def bring(self, manifest: AdapterManifest, path: Path, load: Load) -> AdapterVector:
        """What `load` makes of the adapter's bytes; it is called again, with the file, if host memory gave damaged
        bytes.

        Raises:
            AdapterRejected: the file holds another number of bytes than the manifest says.
            StoredFileDamaged: it holds other bytes than were imported.
            OSError: it cannot be read.
        """
        if self._tier is None:
            return self._from_file(manifest, path, load)[0]
        name = _name(manifest.digest)
        copy = self._tier.lease_copy(name)
        is_damaged = False
        try:
            loaded, took_s = None, 0.0  # how long a file takes is known of what host memory has
            if copy is not None:
                loaded = self._from_memory(manifest, copy, load)
                is_damaged = loaded is None
            if loaded is None:
                loaded, took_s = self._from_file(manifest, path, load)
            self._tier.hold(self._held(manifest, path, took_s))  # before the lease ends, so that it is never idle
            return loaded
        finally:
            if copy is not None:
                self._tier.release(name, is_damaged=is_damaged)

    def let_go(self, digest: AdapterDigest) -> None:
        """The engine does not have an adapter any more that it brought."""
        if self._tier is not None:
            self._tier.release(_name(digest))

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown()

    def _from_file(self, manifest: AdapterManifest, path: Path, load: Load) -> tuple[AdapterVector, float]:
        """And how long it took, without resting."""
        started_s, rested_s = self._clock.monotonic_s(), self._pace.rested_s
        with FileSource(path, stored_bytes(manifest), self._pace.rest) as source:
            loaded = load(source)
        return loaded, self._clock.monotonic_s() - started_s - (self._pace.rested_s - rested_s)

    def _from_memory(self, manifest: AdapterManifest, copy: Copy, load: Load) -> AdapterVector | None:
        """None if its bytes are damaged."""
        source: VectorSource
        try:
            if copy.is_packed:
                source = PackedSource(copy.descriptor, copy.num_bytes, self._executor, self._pace.rest)
            else:
                source = MemorySource(copy.descriptor, copy.num_bytes, self._pace.rest)
            if source.num_bytes != stored_bytes(manifest):
                raise PackedDamaged(f"it has {source.num_bytes} bytes, {stored_bytes(manifest)} were expected")
            return load(source)
        except PackedDamaged as error:
            _logger.error("host memory has damaged bytes of %s, which is read again: %s", manifest.digest, error)
            return None

    def _held(self, manifest: AdapterManifest, path: Path, took_s: float) -> Hold:
        num_bytes = stored_bytes(manifest)
        if self._disk_bytes_s is not None:  # host memory stands in for the disk, whatever the page cache had this time
            took_s = max(took_s, num_bytes / self._disk_bytes_s)
        return Hold(_name(manifest.digest), num_bytes, manifest.dtype, took_s, str(path))

    def _executor(self) -> ThreadPoolExecutor | None:
        return self._threads if self._pace.is_quiet else None


def _name(digest: AdapterDigest) -> str:
    return f"adapter/{digest}"
