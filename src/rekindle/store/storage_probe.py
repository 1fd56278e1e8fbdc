"""Finds out how to read from the filesystem that holds a directory: with how many threads, and how much at once.

The probe takes about a second and reads a file of its own, with the reader whose profile it finds. Rates are those into
memory that is in use already; the kernel's work for pages that are touched for the first time is not the disk's.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from rekindle.errors import ConfigurationError
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.store.reading import FileRead, aligned_buffer
from rekindle.units import MIB

PROBE_BYTES = 128 * MIB
"""How much is read."""

_LEAST_BYTES = 16 * MIB
_READ_S = 0.1
"""How long one read should take; a slow disk reads less of the file."""

_NUM_THREADS = (4, 8, 16)
"""With fewer the disk idles while threads compare checksums or get pages that nobody has touched: on two cores and a
disk that two threads saturate, 96 MiB into new memory took 94 ms with two and 80 ms with four."""

_CHUNK_BYTES = (MIB, 4 * MIB)
_NUM_READS = 2
"""Of each kind; the quicker one counts."""

_GOOD_ENOUGH = 0.95
"""Of the best rate. More threads than that takes would only be more at once for a disk that others read too."""


def probe_storage(directory: Path) -> StorageProfile:
    """Measure with a file of 128 MiB that is made in `directory` and removed. Where the filesystem takes no direct
    reads, the result is the default without rates.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="rekindle-probe-") as file:
            block = os.urandom(MIB)  # not zeros, which a filesystem or a disk may not store
            for _ in range(PROBE_BYTES // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return _measured(Path(file.name))
    except OSError as error:
        raise ConfigurationError(f"{directory} cannot be measured: {error}") from error


def _measured(path: Path) -> StorageProfile:
    buffer = memoryview(aligned_buffer(PROBE_BYTES))
    first = _direct_rate(path, buffer, DEFAULT_PROFILE.num_threads, DEFAULT_PROFILE.chunk_bytes)
    if first is None:
        return DEFAULT_PROFILE
    part = buffer[: min(max(int(first * _READ_S) // MIB * MIB, _LEAST_BYTES), PROBE_BYTES)]
    rates: dict[tuple[int, int], float] = {}
    for num_threads in _NUM_THREADS:
        best_with_fewer = max(rates.values(), default=0.0)
        for chunk_bytes in _CHUNK_BYTES:
            rates[num_threads, chunk_bytes] = max(
                _direct_rate(path, part, num_threads, chunk_bytes) or 0.0 for _ in range(_NUM_READS)
            )
        if max(rates.values()) < best_with_fewer / _GOOD_ENOUGH:
            break
    best = max(rates.values())
    num_threads, chunk_bytes = next(kind for kind, rate in rates.items() if rate >= _GOOD_ENOUGH * best)
    cached = max(_rate(path, buffer, StorageProfile(chunk_bytes, num_threads))[0] for _ in range(_NUM_READS))
    return StorageProfile(chunk_bytes, num_threads, direct_bytes_s=best, cached_bytes_s=cached)


def _direct_rate(path: Path, buffer: memoryview, num_threads: int, chunk_bytes: int) -> float | None:
    """Bytes a second past the page cache; None if the filesystem does not allow that."""
    past_cache = StorageProfile(chunk_bytes, num_threads, direct_bytes_s=1.0, cached_bytes_s=0.0)
    rate, is_direct = _rate(path, buffer, past_cache)
    return rate if is_direct else None


def _rate(path: Path, buffer: memoryview, profile: StorageProfile) -> tuple[float, bool]:
    started_s = time.perf_counter()
    with FileRead(path, buffer, num_bytes=len(buffer), profile=profile) as read:
        read.wait()
        return len(buffer) / (time.perf_counter() - started_s), read.is_direct
