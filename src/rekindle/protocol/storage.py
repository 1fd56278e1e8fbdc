"""How to read from the filesystem that holds the home, as it was measured there or as is usual."""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.units import MIB

BLOCK_BYTES = 4096
"""Direct reads begin and end at multiples of it, in the file and in memory. Devices ask for 512 or this."""

MAX_CHUNK_BYTES, MAX_THREADS = 64 * MIB, 128
"""Beyond what any device gains by."""


@dataclass(frozen=True, slots=True)
class StorageProfile:
    """How to read from one filesystem, and what it gave then: `num_threads` threads read `chunk_bytes` each at once.

    Rates are in bytes a second, None where nobody measured them; `rekindle.store.storage_probe` does.
    """

    chunk_bytes: int = 4 * MIB
    num_threads: int = 4
    direct_bytes_s: float | None = None
    cached_bytes_s: float | None = None

    def __post_init__(self) -> None:
        if not BLOCK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES or self.chunk_bytes % BLOCK_BYTES:
            raise ValueError(
                f"chunk_bytes is {self.chunk_bytes}; it must be a multiple of {BLOCK_BYTES}, at most {MAX_CHUNK_BYTES}"
            )
        if not 1 <= self.num_threads <= MAX_THREADS:
            raise ValueError(f"num_threads is {self.num_threads}; it must lie in [1, {MAX_THREADS}]")

    @property
    def prefers_cache(self) -> bool:
        """Whether what the page cache holds is to be copied from there. Arrays of disks can be faster than copying."""
        if self.direct_bytes_s is None or self.cached_bytes_s is None:
            return True
        return self.cached_bytes_s > self.direct_bytes_s


DEFAULT_PROFILE = StorageProfile()
