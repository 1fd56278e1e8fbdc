"""The page pool's memory on a CPU: an anonymous file of equal pages, and mappings that lay scattered pages in a row.

The file is mapped once as a whole, which is how keys and values are addressed, and adapters in adjacent pages.
Scattered pages of others are mapped once more, side by side. Which page belongs to whom is the scheduler's business.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from rekindle.closing import Closing
from rekindle.engine.kernels.interface import AttentionShape, KVPool
from rekindle.errors import ConfigurationError
from rekindle.units import format_bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_MAP_FIXED = 0x10
_MADV_POPULATE_READ = 22  # Linux 5.14
_MAP_FAILED = ctypes.c_void_p(-1).value

_PIECE_BYTES = 1 << 20
"""How much is entered into a page table, or removed, by one call of the kernel."""


class PagePool:
    """`num_pages` pages of `page_bytes` bytes, a multiple of the machine's page size. Untouched pages cost nothing.
    `rest` is called between the pieces of long work.

    Raises:
        ConfigurationError: the pool cannot be reserved, or its page size is not a multiple of the machine's.
    """

    def __init__(self, num_pages: int, page_bytes: int, rest: Callable[[], None] = lambda: None) -> None:
        if page_bytes % mmap.PAGESIZE:
            raise ConfigurationError(f"pages of {page_bytes} bytes are not a multiple of {mmap.PAGESIZE}")
        self.num_pages, self.page_bytes, self._rest = num_pages, page_bytes, rest
        self._fd = os.memfd_create("rekindle-pages", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._fd, num_pages * page_bytes)
            self._map = mmap.mmap(self._fd, num_pages * page_bytes)
        except (OSError, ValueError) as error:
            os.close(self._fd)
            size = format_bytes(num_pages * page_bytes)
            raise ConfigurationError(f"cannot reserve a page pool of {size}: {error}") from error

    def kv(self, shape: AttentionShape, num_layers: int, page_tokens: int, dtype: torch.dtype) -> KVPool:
        """The pool as keys and values; a page may be a little longer than its tokens need."""
        elements = torch.frombuffer(self._map, dtype=dtype)
        return kv_of_pages(elements.view(self.num_pages, -1), shape, num_layers, page_tokens)

    def map_pages(self, pages: Sequence[int]) -> Pages:
        """The given pages side by side, in order, as one writable vector."""
        runs = _runs(pages)
        if len(runs) == 1:
            first, count = runs[0][1]
            return Pages(memoryview(self._map)[first * self.page_bytes : (first + count) * self.page_bytes])
        return MappedPages(self._fd, pages, self.page_bytes, self._rest)

    def views(self, pages: Sequence[int], num_bytes: int) -> list[memoryview]:
        """The first `num_bytes` bytes of the given pages, in order, in runs of adjacent pages."""
        whole, views, left = memoryview(self._map), [], num_bytes
        for _, (first, count) in _runs(pages):
            length = min(count * self.page_bytes, left)
            views.append(whole[first * self.page_bytes : first * self.page_bytes + length])
            left -= length
        return views

    def close(self) -> None:
        """Give the file up; memory goes when the last mapping of it does."""
        os.close(self._fd)


class Pages(Closing):
    """Pages side by side as one vector, which may be used until `close`."""

    def __init__(self, buffer: memoryview | ctypes.Array[ctypes.c_char]) -> None:
        self._buffer = buffer

    def tensor(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        """`count` elements from element `offset` on."""
        return torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=offset * dtype.itemsize)

    def populate(self) -> None:
        """Enter all pages into the process's page table, which saves their readers a fault each. Advice only."""

    def close(self) -> None:
        """Undo what was done to lay the pages side by side."""


class MappedPages(Pages):
    """Scattered pages mapped side by side.

    Raises:
        OSError: the kernel allows no more mappings (`vm.max_map_count`); each run of adjacent pages is one.
    """

    def __init__(self, fd: int, pages: Sequence[int], page_bytes: int, rest: Callable[[], None]) -> None:
        self._num_bytes, self._rest = len(pages) * page_bytes, rest
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._address = _mmap(None, self._num_bytes, 0, anonymous, -1, 0)
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        try:
            for index, (first, count) in _runs(pages):
                place = self._address + index * page_bytes
                _mmap(place, count * page_bytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, first * page_bytes)
        except OSError:
            self.close()
            raise
        super().__init__((ctypes.c_char * self._num_bytes).from_address(self._address))

    def populate(self) -> None:
        for address, length in self._pieces():
            _libc.madvise(address, length, _MADV_POPULATE_READ)
            self._rest()

    def close(self) -> None:
        if self._address:
            for address, length in self._pieces():
                _libc.munmap(address, length)
                self._rest()
            self._address = 0

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """(address, length) of parts of the mapping."""
        for first in range(0, self._num_bytes, _PIECE_BYTES):
            yield self._address + first, min(_PIECE_BYTES, self._num_bytes - first)


def kv_of_pages(pool_PX: torch.Tensor, shape: AttentionShape, num_layers: int, page_tokens: int) -> KVPool:
    """Pages of elements as keys and values; a page may be a little longer than its tokens need."""
    width = 2 * shape.num_kv_heads
    token = width * shape.head_dim
    sizes = (len(pool_PX), num_layers, page_tokens, width, shape.head_dim)
    return KVPool(pool_PX.as_strided(sizes, (pool_PX.stride(0), page_tokens * token, token, shape.head_dim, 1)))


def token_bytes_for(shape: AttentionShape, num_layers: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of all layers for one token."""
    return num_layers * 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize


def page_bytes_for(shape: AttentionShape, num_layers: int, page_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of a page that holds the keys and values of all layers for `page_tokens` tokens, rounded up to 4 KiB."""
    payload = page_tokens * token_bytes_for(shape, num_layers, dtype)
    return -(-payload // mmap.PAGESIZE) * mmap.PAGESIZE


def _mmap(address: int | None, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result = _libc.mmap(address, length, protection, flags, fd, offset)
    if result == _MAP_FAILED or result is None:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap of {length} bytes failed: {os.strerror(code)}")
    return int(result)


def _runs(pages: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """(index in `pages`, (first page, number of adjacent pages)) of each maximal run of rising neighbours."""
    runs: list[tuple[int, tuple[int, int]]] = []
    start = 0
    for i in range(1, len(pages) + 1):
        if i == len(pages) or pages[i] != pages[i - 1] + 1:
            runs.append((start, (pages[start], i - start)))
            start = i
    return runs
