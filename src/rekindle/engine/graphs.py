"""Decode steps recorded once and replayed, which spares a GPU's queue the launches of every layer.

A graph is recorded for a number of rows, a width of the page tables and bounds on the ranks of the adapters and of the
one that is taken off the weights, each rounded up to one of a few values, and reads everything else from fixed buffers:
which pages, how long a context, and through addresses which adapters. No adapter that comes or goes, is merged into the
model's own weights or taken out of them, and no page that moves, makes a recording stale. Rows that only fill a batch
up write their keys and values into a scratch page.

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
from rekindle.engine.lora_times import LoraTimer, Spans
from rekindle.engine.models.decoder import ForwardBatch

_logger = logging.getLogger(__name__)

_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LEAST_PAGES = 16
_LEAST_RANK = 16
_UNMERGE_SEGMENTS = 2
"""Rows of others, which come first, and those of the merged adapter."""
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
    """What a recording is good for: up to so many rows, pages a sequence, and ranks (0: no adapters, or none to take
    off)."""

    rows: int
    pages: int
    rank: int
    unmerged_rank: int


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

    def __init__(
        self,
        forward: Forward,
        recorder: Recorder,
        sizes: GraphSizes,
        pool_PX: torch.Tensor,
        timer: LoraTimer | None = None,
    ) -> None:
        self._forward, self._recorder, self._pool_PX, self._timer = forward, recorder, pool_PX, timer
        self._spans: dict[_Shape, Spans] = {}
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
        if self._timer is not None:
            self._timer.add(self._spans[shape])
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
        if self._timer is not None:
            self._spans[shape] = self._timer.take()  # those of a warm-up are replaced by those of the recording

    def _shape(self, batch: ForwardBatch) -> _Shape | None:
        if batch.weights is not None:
            return None
        num_rows, num_pages = len(batch.positions_T), batch.attention.pages_SM.shape[1]
        rows = next((rows for rows in self._rows if rows >= num_rows), None)
        if rows is None:
            return None
        pages = min(_power_of_two(num_pages, _LEAST_PAGES), self._max_pages)
        return _Shape(rows, pages, _rank(batch.lora), _rank(batch.unmerge))


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
        self._lora, self._unmerge = _LoraBuffers(rows, device), _LoraBuffers(_UNMERGE_SEGMENTS, device)
        self._scratch_page, self._page_tokens = sizes.scratch_page, sizes.page_tokens

    def batch(self, shape: _Shape, pool_PX: torch.Tensor | None) -> ForwardBatch:
        """The buffers as a batch of a row for each sequence, whose sizes bound those of every batch that is filled
        in."""
        rows = shape.rows
        attention = AttentionBatch(
            query_start=list(range(rows + 1)),
            context=[shape.pages * self._page_tokens] * rows,
            query_start_S1=self._query_start_S1[: rows + 1],
            context_S=self._context_S[:rows],
            pages_SM=self._pages_of(shape),
            slots_T=self._slots_T[:rows],
        )
        return ForwardBatch(
            self._token_ids_T[:rows],
            self._positions_T[:rows],
            attention,
            lora=self._lora.batch(rows, shape.rank, pool_PX),
            unmerge=self._unmerge.batch(rows, shape.unmerged_rank, pool_PX),
        )

    def clear(self, shape: _Shape) -> None:
        """Make every row one that only fills up: a first token in the scratch page, under no adapter."""
        self._fill_up(shape, 0)
        self._lora.clear()
        self._unmerge.clear()

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
            self._lora.fill(batch.lora, num_rows)
        if batch.unmerge is not None:
            self._unmerge.fill(batch.unmerge, num_rows)

    def _fill_up(self, shape: _Shape, first: int) -> None:
        self._positions_T[first : shape.rows] = 0
        self._slots_T[first : shape.rows] = self._scratch_page * self._page_tokens
        self._context_S[first : shape.rows] = 1
        self._pages_of(shape)[first:] = self._scratch_page

    def _pages_of(self, shape: _Shape) -> torch.Tensor:
        return self._pages[: shape.rows * shape.pages].view(shape.rows, shape.pages)


class _LoraBuffers:
    """The segments of a `LoraBatch` that recordings read."""

    def __init__(self, max_segments: int, device: torch.device) -> None:
        self._row_start_G1 = torch.zeros(max_segments + 1, dtype=torch.int32, device=device)
        self._tables_G = torch.zeros(max_segments, dtype=torch.int64, device=device)
        self._places_G = torch.zeros(max_segments, dtype=torch.int64, device=device)

    def batch(self, rows: int, rank: int, pool_PX: torch.Tensor | None) -> LoraBatch | None:
        """The buffers as a batch of up to `rows` segments, or of all there is room for; None without ranks."""
        if not rank:
            return None
        num_segments = min(rows, len(self._tables_G))
        return LoraBatch(
            row_start=[*range(num_segments), rows],
            row_start_G1=self._row_start_G1[: num_segments + 1],
            adapters=(),
            tables_G=self._tables_G[:num_segments],
            places_G=self._places_G[:num_segments],
            max_rank=rank,
            pool_PX=pool_PX,
        )

    def clear(self) -> None:
        self._row_start_G1.zero_()
        self._tables_G.zero_()

    def fill(self, batch: LoraBatch, num_rows: int) -> None:
        num_segments = len(batch.tables_G)
        self._row_start_G1[: num_segments + 1] = batch.row_start_G1
        self._row_start_G1[num_segments + 1 :] = num_rows
        self._tables_G[:num_segments] = batch.tables_G
        self._places_G[:num_segments] = batch.places_G
        self._tables_G[num_segments:] = 0


def _rank(batch: LoraBatch | None) -> int:
    """The bound on ranks that a recording for this batch has; 0 without one."""
    return 0 if batch is None or not batch.max_rank else _power_of_two(batch.max_rank, _LEAST_RANK)


def _power_of_two(value: int, least: int) -> int:
    return max(1 << (value - 1).bit_length(), least)
