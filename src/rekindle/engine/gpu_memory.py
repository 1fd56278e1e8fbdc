"""The pool on a GPU: one tensor of pages, into which adapters are copied on a stream of their own.

A load goes from the file through two pinned buffers to the device, so that reading one piece overlaps copying the one
before. The copies wait for the work that the step loop had submitted when it gave the pages away (its `fence`), and a
load ends only when its last copy has. Everything here also runs on a tensor of a CPU, where there are no streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rekindle.engine.kernels.interface import AttentionShape, KVPool
from rekindle.engine.memory import kv_of_pages
from rekindle.engine.vectors import PagedVector, dtype_of
from rekindle.errors import ConfigurationError
from rekindle.pace import Pace
from rekindle.protocol.adapters import AdapterManifest
from rekindle.store.vector_sources import VectorSource
from rekindle.units import MIB, format_bytes

_STAGED_BYTES = 16 * MIB
"""One of the two pinned buffers: long enough that a copy runs at the link's rate."""


class GpuMemory:
    """See `DeviceMemory` for the contract of each method. The last page, which the scheduler does not know of, takes
    the keys and values of rows that only fill a batch up.

    Raises:
        ConfigurationError: the device has not so much memory left.
    """

    def __init__(self, num_pages: int, page_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.pace = Pace()  # never told that steps run: copies do not keep kernels from running
        try:
            self.pool_PX = torch.zeros(num_pages + 1, page_bytes // dtype.itemsize, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            size = format_bytes((num_pages + 1) * page_bytes)
            raise ConfigurationError(f"cannot reserve a page pool of {size} on {device}: {error}") from error
        self._copies = _Copies(device)

    def kv(self, shape: AttentionShape, num_layers: int, page_tokens: int) -> KVPool:
        return kv_of_pages(self.pool_PX, shape, num_layers, page_tokens)

    def fence(self) -> torch.cuda.Event | None:
        return self._copies.fence()

    def give_way(self, is_busy: bool) -> None:
        """Loads are no hindrance to kernels."""

    def load(self, manifest: AdapterManifest, pages: Sequence[int], source: VectorSource, fence: object) -> PagedVector:
        assert fence is None or isinstance(fence, torch.cuda.Event)
        self._copies.wait_for(fence)
        piece_elements = self._copies.staged_bytes // self._dtype.itemsize
        try:
            for first in range(0, manifest.num_elements, piece_elements):
                staged = self._copies.next_buffer().view(self._dtype)
                count = min(piece_elements, manifest.num_elements - first)
                self._stage(source, dtype_of(manifest), staged[:count])
                self._copy_to_pages(staged[:count], pages, first)
        finally:
            self._copies.finish()
        return PagedVector(self.pool_PX, pages)

    def close(self) -> None:
        """The tensor goes with its last reference."""

    def _stage(self, source: VectorSource, dtype: torch.dtype, staged: torch.Tensor) -> None:
        if dtype == self._dtype:
            source.read([staged.view(torch.uint8).numpy().data])
            return
        own = torch.empty(len(staged), dtype=dtype)
        source.read([own.view(torch.uint8).numpy().data])
        staged.copy_(own)

    def _copy_to_pages(self, piece: torch.Tensor, pages: Sequence[int], first: int) -> None:
        """Copy elements `first ..` of the vector to where they belong, page by page."""
        page_elements = self.pool_PX.shape[1]
        with self._copies.on_stream():
            done = 0
            while done < len(piece):
                index, offset = divmod(first + done, page_elements)
                count = min(page_elements - offset, len(piece) - done)
                target = self.pool_PX[pages[index], offset : offset + count]
                target.copy_(piece[done : done + count], non_blocking=True)
                done += count


class _Copies:
    """Two pinned buffers and a stream to copy from them. Belongs to the reader thread, apart from `fence`."""

    def __init__(self, device: torch.device) -> None:
        self.staged_bytes = _STAGED_BYTES
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(_STAGED_BYTES, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._latest = 0

    def fence(self) -> torch.cuda.Event | None:
        """A mark after all work that the calling thread has submitted."""
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait_for(self, fence: torch.cuda.Event | None) -> None:
        """Let copies from now on run only after the fence."""
        if self._stream is not None and fence is not None:
            self._stream.wait_event(fence)

    def next_buffer(self) -> torch.Tensor:
        """The buffer used least recently, once its copy has ended."""
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._copied[self._latest] = event
        self._latest = 1 - self._latest
        if (copied := self._copied[self._latest]) is not None:
            copied.synchronize()
        return self._buffers[self._latest]

    def on_stream(self) -> torch.cuda.StreamContext:
        return torch.cuda.stream(self._stream)

    def finish(self) -> None:
        """Wait until all copies have ended."""
        if self._stream is not None:
            self._stream.synchronize()
