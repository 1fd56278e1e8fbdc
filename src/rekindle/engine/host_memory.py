"""The pool on a CPU: pages of an anonymous file, into which adapters are read in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rekindle.engine.kernels.interface import AttentionShape, KVPool
from rekindle.engine.memory import PagePool
from rekindle.engine.vectors import MappedVector, dtype_of, read_pieces
from rekindle.pace import Pace
from rekindle.protocol.adapters import AdapterManifest
from rekindle.store.vector_sources import VectorSource

_STAGED_ELEMENTS = 1 << 15
"""How much of a file in another dtype is converted at once: no more than torch does in the calling thread alone."""


class HostMemory:
    """See `DeviceMemory` for the contract of each method."""

    pool_PX: torch.Tensor | None = None

    def __init__(self, num_pages: int, page_bytes: int, dtype: torch.dtype) -> None:
        self.pace = Pace()
        self._pool, self._dtype = PagePool(num_pages, page_bytes, self.pace.rest), dtype

    def kv(self, shape: AttentionShape, num_layers: int, page_tokens: int) -> KVPool:
        return self._pool.kv(shape, num_layers, page_tokens, self._dtype)

    def fence(self) -> None:
        """Nothing runs after a step has returned."""

    def give_way(self, is_busy: bool) -> None:
        self.pace.give_way(is_busy)

    def load(
        self, manifest: AdapterManifest, pages: Sequence[int], source: VectorSource, fence: object
    ) -> MappedVector:
        dtype = dtype_of(manifest)
        if dtype == self._dtype:
            # Pages used before are mapped in the pool already; through a new mapping each would fault on the way.
            source.read(self._pool.views(pages, source.num_bytes))
        mapped = self._pool.map_pages(pages)
        try:
            if dtype != self._dtype:
                for first, piece in read_pieces(source, dtype, _STAGED_ELEMENTS):
                    mapped.tensor(self._dtype, len(piece), first).copy_(piece)
            mapped.populate()
            return MappedVector(mapped, self._dtype, manifest.num_elements)
        except BaseException:
            mapped.close()
            raise

    def close(self) -> None:
        self._pool.close()
