"""An adapter's flat vector in device memory, and how its matrices are seen.

On a CPU the vector's pages are mapped side by side and every matrix is a view. On a GPU they stay where they are, and
what no kernel reads straight from the pages is gathered when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from rekindle.engine.kernels.interface import RANK_FIELD, AdapterMatrices
from rekindle.engine.memory import Pages
from rekindle.protocol.adapters import AdapterManifest
from rekindle.store.vector_sources import VectorSource
from rekindle.units import MIB

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_GATHERED_BYTES = 64 * MIB
"""How much of a whole matrix is gathered from pages at once."""


class AdapterVector(Protocol):
    """A resident adapter's elements. Matrices are row-major at offsets counted in elements."""

    def matrices(self, table_LPF: torch.Tensor) -> AdapterMatrices:
        """What kernels need to find the matrices that the table describes."""
        ...

    def elements(self, offset: int, count: int) -> torch.Tensor:
        """Consecutive elements, side by side."""
        ...

    def rows(self, offset: int, columns: int, index_T: torch.Tensor) -> torch.Tensor:
        """Some rows [T, columns] of a matrix."""
        ...

    def parts(self, offset: int, rows: int, columns: int) -> Iterator[torch.Tensor]:
        """A matrix in consecutive runs of its rows."""
        ...

    def close(self) -> None:
        """Give up what is held beside the pages; the vector may not be used afterwards."""
        ...


class MappedVector:
    """A vector in pages that lie, or are mapped, side by side."""

    def __init__(self, pages: Pages, dtype: torch.dtype, num_elements: int) -> None:
        self._pages = pages
        self._elements = pages.tensor(dtype, num_elements, 0)

    def matrices(self, table_LPF: torch.Tensor) -> AdapterMatrices:
        return AdapterMatrices(table_LPF, _max_rank(table_LPF), vector=self._elements)

    def elements(self, offset: int, count: int) -> torch.Tensor:
        return self._elements[offset : offset + count]

    def rows(self, offset: int, columns: int, index_T: torch.Tensor) -> torch.Tensor:
        num_rows = (len(self._elements) - offset) // columns
        return self.elements(offset, num_rows * columns).view(num_rows, columns)[index_T]

    def parts(self, offset: int, rows: int, columns: int) -> Iterator[torch.Tensor]:
        yield self.elements(offset, rows * columns).view(rows, columns)

    def close(self) -> None:
        self._pages.close()


class PagedVector:
    """A vector in scattered pages of a pool [pages, elements]."""

    def __init__(self, pool_PX: torch.Tensor, pages: Sequence[int]) -> None:
        self._pool_PX = pool_PX
        self._pages_M = torch.tensor(pages, dtype=torch.int32, device=pool_PX.device)

    def matrices(self, table_LPF: torch.Tensor) -> AdapterMatrices:
        return AdapterMatrices(table_LPF.to(self._pool_PX.device), _max_rank(table_LPF), pages_M=self._pages_M)

    def elements(self, offset: int, count: int) -> torch.Tensor:
        first, skipped = divmod(offset, self._pool_PX.shape[1])
        end = -(-(offset + count) // self._pool_PX.shape[1])
        return self._pool_PX[self._pages_M[first:end]].flatten()[skipped : skipped + count]

    def rows(self, offset: int, columns: int, index_T: torch.Tensor) -> torch.Tensor:
        column = torch.arange(columns, device=self._pool_PX.device)
        element_TC = offset + index_T.unsqueeze(1) * columns + column
        page_elements = self._pool_PX.shape[1]
        return self._pool_PX[self._pages_M[element_TC // page_elements].long(), element_TC % page_elements]

    def parts(self, offset: int, rows: int, columns: int) -> Iterator[torch.Tensor]:
        rows_at_once = max(_GATHERED_BYTES // (columns * self._pool_PX.element_size()), 1)
        for first in range(0, rows, rows_at_once):
            count = min(rows_at_once, rows - first)
            yield self.elements(offset + first * columns, count * columns).view(count, columns)

    def close(self) -> None:
        pass


def _max_rank(table_LPF: torch.Tensor) -> int:
    return int(table_LPF[..., RANK_FIELD].max())


def dtype_of(manifest: AdapterManifest) -> torch.dtype:
    """Of the elements as they are stored."""
    return _DTYPES[manifest.dtype]


def stored_bytes(manifest: AdapterManifest) -> int:
    """Length of the vector as it is stored."""
    return manifest.num_elements * dtype_of(manifest).itemsize


def read_pieces(source: VectorSource, dtype: torch.dtype, num_elements: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element, elements in the source's own `dtype`) of pieces of at most `num_elements`. A piece is valid until
    the next is asked for."""
    staged = bytearray(num_elements * dtype.itemsize)
    for first in range(0, source.num_bytes // dtype.itemsize, num_elements):
        piece = memoryview(staged)[: source.num_bytes - first * dtype.itemsize]
        source.read([piece])
        yield first, torch.frombuffer(piece, dtype=dtype)
