"""Decode steps recorded once and replayed, which spares a GPU's queue the launches of every layer.

A graph is recorded for a number of rows, a width of the page tables and a bound on the adapters' ranks, each rounded up
to one of a few values, and reads everything else from fixed buffers: which pages, how long a context, and through
addresses which adapters. No adapter that comes or goes, and no page that moves, makes a recording stale. Rows that only
fill a batch up write their keys and values into a scratch page.

Graphs are recorded between steps, at most one at a time, for shapes that were wanted some times; until then a step runs
eagerly.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from rekindle.engine.kernels.interface import AttentionBatch, LoraBatch
from rekindle.engine.models.decoder import ForwardBatch

_logger = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LEAST_PAGES = 16
_LEAST_RANK = 16
_MAX_RECORDINGS = 64
_WANTED_TIMES = 3
"""How often a shape comes up before it is recorded."""

Forward = Callable[[torch.Tensor, ForwardBatch], torch.Tensor]
"""From embeddings [T, H] and a batch to hidden states [T, H]."""


class Recording(Protocol):
    """A recorded computation on fixed tensors."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Runs a function once in such a way that it can be replayed."""

    def record(self, function: Callable[[], None]) -> Recording: ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def record(self, function: Callable[[], None]) -> Recording:
        # Kernels are compiled and libraries get their workspaces before the capture, in which neither is allowed.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The adapters' reader calls CUDA meanwhile, which must not spoil the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        self._pool = self._pool or graph.pool()
        return graph


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a recording is good for: up to so many rows, pages a sequence, and ranks (0: no adapters)."""

    rows: int
    pages: int
    rank: int


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """What the buffers are made for. `scratch_page` belongs to nobody."""

    hidden: int
    max_rows: int
    max_pages: int
    page_tokens: int
    scratch_page: int


class DecodeGraphs:
    """See the module."""

    def __init__(self, forward: Forward, recorder: Recorder, sizes: GraphSizes, pool_PX: torch.Tensor) -> None:
        self._forward, self._recorder, self._pool_PX = forward, recorder, pool_PX
        self._max_pages = sizes.max_pages
        self._rows = (*(rows for rows in _ROWS if rows < sizes.max_rows), sizes.max_rows)
        self._buffers = _Buffers(sizes, pool_PX.dtype, pool_PX.device)
        self._recorded: dict[_Shape, Recording] = {}
        self._refused: set[_Shape] = set()
        self._wanted: Counter[_Shape] = Counter()

    def run(self, embedded_TH: torch.Tensor, batch: ForwardBatch) -> torch.Tensor | None:
        """Hidden states of a batch with one row a sequence, valid until the next call; None if no recording fits it
        yet."""
        shape = self._shape(batch)
        if shape is None:
            return None
        recording = self._recorded.get(shape)
        if recording is None:
            if shape not in self._refused and len(self._recorded) < _MAX_RECORDINGS:
                self._wanted[shape] += 1
            return None
        self._buffers.fill(embedded_TH, batch, shape)
        recording.replay()
        return self._buffers.hidden_TH[: len(embedded_TH)]

    def record_next(self) -> bool:
        """Record the shape that was wanted most, if any was wanted often enough. Called between steps.

        A recording that fails, for lack of memory say, leaves its shape to eager steps, hence the broad handler.
        """
        wanted = self._wanted.most_common(1)
        if not wanted or wanted[0][1] < _WANTED_TIMES:
            return False
        shape = wanted[0][0]
        del self._wanted[shape]
        self._buffers.clear(shape)
        try:
            self._recorded[shape] = self._recorder.record(lambda: self._compute(shape))
        except Exception:
            _logger.exception("no graph for up to %d rows: steps of this size run eagerly", shape.rows)
            self._refused.add(shape)
            return False
        return True

    def _compute(self, shape: _Shape) -> None:
        buffers = self._buffers
        hidden_TH = self._forward(buffers.embedded_TH[: shape.rows], buffers.batch(shape, self._pool_PX))
        buffers.hidden_TH[: shape.rows].copy_(hidden_TH)

    def _shape(self, batch: ForwardBatch) -> _Shape | None:
        max_rank = 0 if batch.lora is None else batch.lora.max_rank
        num_rows, num_pages = len(batch.positions_T), batch.attention.pages_SM.shape[1]
        rows = next((rows for rows in self._rows if rows >= num_rows), None)
        if rows is None:
            return None
        pages = min(_power_of_two(num_pages, _LEAST_PAGES), self._max_pages)
        return _Shape(rows, pages, _power_of_two(max_rank, _LEAST_RANK) if max_rank else 0)


class _Buffers:
    """The tensors that recordings read and write."""

    def __init__(self, sizes: GraphSizes, dtype: torch.dtype, device: torch.device) -> None:
        rows = sizes.max_rows

        def integers(count: int, kind: torch.dtype) -> torch.Tensor:
            return torch.zeros(count, dtype=kind, device=device)

        self.embedded_TH = torch.zeros(rows, sizes.hidden, dtype=dtype, device=device)
        self.hidden_TH = torch.zeros(rows, sizes.hidden, dtype=torch.float32, device=device)
        self._token_ids_T, self._positions_T = integers(rows, torch.int64), integers(rows, torch.int64)
        self._slots_T = integers(rows, torch.int64)
        self._query_start_S1 = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self._context_S = integers(rows, torch.int32)
        self._pages = integers(rows * sizes.max_pages, torch.int32)
        self._row_start_G1 = integers(rows + 1, torch.int32)
        self._tables_G, self._places_G = integers(rows, torch.int64), integers(rows, torch.int64)
        self._scratch_page, self._page_tokens = sizes.scratch_page, sizes.page_tokens

    def batch(self, shape: _Shape, pool_PX: torch.Tensor | None) -> ForwardBatch:
        """The buffers as a batch of a row for each sequence and, if there are adapters, for each segment: its sizes
        bound those of every batch that is filled in."""
        rows = shape.rows
        attention = AttentionBatch(
            query_start=list(range(rows + 1)),
            context=[shape.pages * self._page_tokens] * rows,
            query_start_S1=self._query_start_S1[: rows + 1],
            context_S=self._context_S[:rows],
            pages_SM=self._pages_of(shape),
            slots_T=self._slots_T[:rows],
        )
        lora = None
        if shape.rank:
            lora = LoraBatch(
                row_start=list(range(rows + 1)),
                row_start_G1=self._row_start_G1[: rows + 1],
                adapters=(),
                tables_G=self._tables_G[:rows],
                places_G=self._places_G[:rows],
                max_rank=shape.rank,
                pool_PX=pool_PX,
            )
        return ForwardBatch(self._token_ids_T[:rows], self._positions_T[:rows], attention, lora)

    def clear(self, shape: _Shape) -> None:
        """Make every row one that only fills up: a first token in the scratch page, under no adapter."""
        self._fill_up(shape, 0)
        self._row_start_G1[: shape.rows + 1] = 0
        self._tables_G[: shape.rows] = 0

    def fill(self, embedded_TH: torch.Tensor, batch: ForwardBatch, shape: _Shape) -> None:
        """Put a batch in, and fill it up."""
        num_rows, attention = len(embedded_TH), batch.attention
        self.embedded_TH[:num_rows] = embedded_TH
        self._positions_T[:num_rows] = batch.positions_T
        self._slots_T[:num_rows] = attention.slots_T
        self._context_S[:num_rows] = attention.context_S
        self._pages_of(shape)[:num_rows, : attention.pages_SM.shape[1]] = attention.pages_SM
        self._fill_up(shape, num_rows)
        if batch.lora is not None:
            num_segments = len(batch.lora.tables_G)
            self._row_start_G1[: num_segments + 1] = batch.lora.row_start_G1
            self._row_start_G1[num_segments + 1 : shape.rows + 1] = num_rows
            self._tables_G[:num_segments] = batch.lora.tables_G
            self._places_G[:num_segments] = batch.lora.places_G
            self._tables_G[num_segments:] = 0

    def _fill_up(self, shape: _Shape, first: int) -> None:
        self._positions_T[first : shape.rows] = 0
        self._slots_T[first : shape.rows] = self._scratch_page * self._page_tokens
        self._context_S[first : shape.rows] = 1
        self._pages_of(shape)[first:] = self._scratch_page

    def _pages_of(self, shape: _Shape) -> torch.Tensor:
        return self._pages[: shape.rows * shape.pages].view(shape.rows, shape.pages)


def _power_of_two(value: int, least: int) -> int:
    return max(1 << (value - 1).bit_length(), least)
