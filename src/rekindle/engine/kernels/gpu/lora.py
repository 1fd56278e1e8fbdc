"""Low-rank updates of many adapters at once: one launch computes h = x A^T, a second one y += scale * h B.

A program serves one *row tile* (some rows of one segment), one part of the work on it, and reads the adapter's
matrices from its pages. The first G tiles are the first ones of the G segments, so a decode row finds its adapter with
one load; further tiles of long segments follow and are found by a search over `row_start_G1`. What a program must load
before its first weights is thus row_start, table and page list (at once), then the entry, then the page: three waits,
hidden by the other programs of its multiprocessor.

Tiles of few rows are memory-bound and run on ordinary arithmetic, with every weight read once and held in registers
for all rows; tiles of more rows run on tensor cores. The first launch is cut along K as well when it would not fill
the GPU: h is [splits, T, slices * max_rank] in float32, and the second launch sums the splits in an order fixed by the
plan. Nothing is accumulated with atomics, so equal calls give equal bits.

Shape suffixes as in `kernels.interface`, and: U runs of 64 elements, R ranks, C the elements of a run or step, V rows
of a vector tile, T rows of a tensor-core tile, W splits. Matrices are read by runs: they, their rows and pages all
start at multiples of 64 elements where K and N are multiples of 64, so that a run lies in one page. Matrices of other
sizes are looked up element by element.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from rekindle.engine.kernels.gpu.lora_plan import RUN, LoraPlan, make_plan
from rekindle.engine.kernels.interface import LORA_FIELDS, PROJECTIONS, LoraBatch, LoraGroup
from rekindle.errors import InternalError

_COLUMNS = tl.constexpr(len(PROJECTIONS))
_FIELDS = tl.constexpr(LORA_FIELDS)
_SEARCHED = tl.constexpr(128)
"""Segments that one step of the search for a tile looks at."""


class GroupedLora:
    """`Kernels.lora` for a GPU.

    A call is cut to fit the batch, by its lists on the host. With a batch of capacities alone, launches depend on
    tensor sizes and `max_rank`, all else being read on the device: such calls may be captured into a CUDA graph, and
    replayed after the tensors of the batch were rewritten in place (segments beyond the last one empty, with table 0).
    Rows of an adapter of higher rank than `max_rank` become NaN, never plausible.

    With `deterministic`, a row's bits depend on its own input and adapter alone, whatever the batch; otherwise also on
    the sizes that chose the plan and on how many rows share its tile.
    """

    def __init__(self, *, deterministic: bool = False) -> None:
        self._deterministic = deterministic

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        """See `Kernels.lora`."""
        if batch.pool_PX is None:
            raise InternalError("adapters of a GPU lie in pages, but the batch has no page pool")
        num_rows, in_features = x_TK.shape
        plan = make_plan(
            num_rows=num_rows,
            num_segments=len(batch.tables_G),
            segment_rows=_segment_rows(batch),
            max_rank=batch.max_rank,
            in_features=in_features,
            out_sizes=group.out_sizes,
            dtype=x_TK.dtype,
            num_sms=_num_sms(x_TK.device),
            deterministic=self._deterministic,
        )
        if plan is not None:
            launch(plan, x_TK, y_TN, batch, layer, group)


def _segment_rows(batch: LoraBatch) -> tuple[int, ...] | None:
    """The rows of each segment, 0 for the base; None if the batch describes capacities alone."""
    if not batch.adapters:
        return None
    return tuple(
        0 if adapter is None else batch.row_start[g + 1] - batch.row_start[g]
        for g, adapter in enumerate(batch.adapters)
    )


def launch(
    plan: LoraPlan, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup
) -> None:
    """Run a planned update. h is allocated here: while a graph is captured it comes from the graph's own memory."""
    pool_PX = batch.pool_PX
    if pool_PX is None or not x_TK.dtype == y_TN.dtype == pool_PX.dtype:
        raise InternalError(f"{x_TK.dtype} rows, {y_TN.dtype} outputs and the pool must be of one dtype")
    if x_TK.stride(1) != 1 or y_TN.stride(1) != 1:
        raise InternalError(f"rows must be contiguous, not {x_TK.stride(1)} and {y_TN.stride(1)} elements apart")
    if pool_PX.shape[1] % RUN:
        raise InternalError(f"pages of {pool_PX.shape[1]} elements are not a multiple of {RUN}")
    num_rows, in_features = x_TK.shape
    slices = len(group.out_sizes)
    h_STR = torch.empty(plan.splits, num_rows, slices * plan.max_rank, dtype=torch.float32, device=x_TK.device)
    where = (pool_PX, pool_PX.stride(0), batch.row_start_G1, batch.tables_G, batch.places_G)
    sizes = (num_rows, len(batch.tables_G), layer, plan.max_rank)
    common: dict[str, Any] = {
        "FIRST": group.first,
        "RUN": RUN,
        "PAGE": pool_PX.shape[1],
        "TILE_ROWS": plan.tile_rows,
        "VECTOR_ROWS": plan.vector_rows,
        "num_warps": plan.num_warps,
    }
    _shrink_kernel[plan.rank_programs * plan.splits, slices, plan.num_tiles](
        x_TK,
        x_TK.stride(0),
        h_STR,
        *where,
        *sizes,
        plan.chunk,
        plan.rank_programs,
        K=in_features,
        ALIGNED=in_features % RUN == 0,
        VECTOR_RANKS=plan.vector_ranks,
        STEP=plan.vector_step,
        DOT_RANKS=plan.dot_ranks,
        STAGES=plan.stages,
        **common,
    )
    _expand_kernel[sum(triton.cdiv(size, plan.columns) for size in group.out_sizes), plan.num_tiles](
        y_TN,
        y_TN.stride(0),
        h_STR,
        *where,
        *sizes,
        SIZES=group.out_sizes,
        OFFSETS=group.out_offsets,
        SPLITS=plan.splits,
        SPLIT_CAPACITY=triton.next_power_of_2(plan.splits),
        COLUMNS=plan.columns,
        DOT_RANKS=plan.expand_dot_ranks,
        DOT_COLUMNS=plan.dot_columns,
        ALIGNED=all(size % RUN == 0 for size in group.out_sizes),
        VECTOR_RANKS=plan.expand_ranks,
        **common,
    )


@functools.cache
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # an H100's, for the interpreter and for compiling without a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _row_tile(tile, row_start_ptr, tables_ptr, places_ptr, num_segments, TILE_ROWS: tl.constexpr):
    """(first row, number of rows, table, page list) of a tile; no table for the base and where no segment is."""
    segment = tile
    skipped = 0
    if tile >= num_segments:
        wanted = tile - num_segments
        segment = 0
        passed = 0
        for start in tl.range(0, num_segments, _SEARCHED):
            g = start + tl.arange(0, _SEARCHED)
            live = g < num_segments
            begin = tl.load(row_start_ptr + g, mask=live, other=0)
            end = tl.load(row_start_ptr + g + 1, mask=live, other=0)
            is_base = tl.load(tables_ptr + g, mask=live, other=0) == 0
            further = tl.where(is_base, 0, tl.maximum(tl.cdiv(end - begin, TILE_ROWS) - 1, 0))
            before = passed + tl.cumsum(further) <= wanted
            segment += tl.sum((before & live).to(tl.int32))
            skipped += tl.sum(tl.where(before, further, 0))
            passed += tl.sum(further)
        skipped = wanted - skipped + 1
    exists = segment < num_segments
    first = tl.load(row_start_ptr + segment, mask=exists, other=0) + skipped * TILE_ROWS
    end = tl.load(row_start_ptr + segment + 1, mask=exists, other=0)
    table = tl.load(tables_ptr + segment, mask=exists, other=0)
    place = tl.load(places_ptr + segment, mask=exists, other=0)
    return first, tl.minimum(end - first, TILE_ROWS), table, place


@triton.jit
def _pointers(address, element):
    return address.to(tl.pointer_type(element))


@triton.jit
def _padded(rank):
    """The ranks of h that are written: zeros beyond the adapter's own let it be read by 16 bytes."""
    return (rank + 7) // 8 * 8


@triton.jit
def _load_runs(
    pool_ptr,
    page_stride,
    pages_ptr,
    offset,
    row_U,
    column_U,
    size,
    rows,
    RUN: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[U, 64] elements from (row, column) on of a row-major matrix with rows of `size` that begins at `offset` of the
    adapter's vector; zero beyond its `rows` rows and its `size` columns. Columns are multiples of 64."""
    lane_C = tl.arange(0, RUN)
    if ALIGNED:
        live_U = (row_U < rows) & (column_U < size)
        run_U = (offset // RUN).to(tl.int32) + row_U * (size // RUN) + column_U // RUN
        page_U = tl.load(pages_ptr + run_U // (PAGE // RUN), mask=live_U, other=0).to(tl.int64)
        start_U = page_U * page_stride + (run_U % (PAGE // RUN)) * RUN
        return tl.load(pool_ptr + start_U[:, None] + lane_C[None, :], mask=live_U[:, None], other=0.0)
    else:  # noqa: RET505 - a constexpr branch, of which only one side is compiled
        column_UC = column_U[:, None] + lane_C[None, :]
        live_UC = (row_U < rows)[:, None] & (column_UC < size)
        at_UC = offset + row_U.to(tl.int64)[:, None] * size + column_UC
        page_UC = tl.load(pages_ptr + at_UC // PAGE, mask=live_UC, other=0).to(tl.int64)
        return tl.load(pool_ptr + page_UC * page_stride + at_UC % PAGE, mask=live_UC, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "num_segments", "layer", "rank_programs"])
def _shrink_kernel(
    x_ptr,
    x_stride,
    h_ptr,
    pool_ptr,
    page_stride,
    row_start_ptr,
    tables_ptr,
    places_ptr,
    num_rows,
    num_segments,
    layer,
    max_rank,
    chunk,
    rank_programs,
    FIRST: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    VECTOR_ROWS: tl.constexpr,
    VECTOR_RANKS: tl.constexpr,
    STEP: tl.constexpr,
    DOT_RANKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h[split, rows, slice] = x[rows, part of K] A[:, part of K]^T. A program takes every `rank_programs`-th block of
    its adapter's own ranks."""
    work, slot, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, rows, table, place = _row_tile(tile, row_start_ptr, tables_ptr, places_ptr, num_segments, TILE_ROWS)
    if (rows <= 0) | (table == 0):
        return
    entry_ptr = _pointers(table, tl.int64) + (layer * _COLUMNS + FIRST + slot) * _FIELDS
    offset = tl.load(entry_ptr)
    rank = tl.minimum(tl.load(entry_ptr + 2), max_rank).to(tl.int32)
    pages_ptr = _pointers(place, tl.int32)

    split, block = work // rank_programs, work % rank_programs
    begin = split * chunk
    end = tl.minimum(begin + chunk, K)
    x_ptr += first.to(tl.int64) * x_stride
    h_stride = tl.num_programs(1) * max_rank
    h_ptr += (split.to(tl.int64) * num_rows + first) * h_stride + slot * max_rank

    if rows <= VECTOR_ROWS:
        if VECTOR_ROWS > 0:
            for start in tl.range(block * VECTOR_RANKS, rank, rank_programs * VECTOR_RANKS):
                _shrink_vector(
                    x_ptr, x_stride, h_ptr, h_stride, pool_ptr, page_stride, pages_ptr, offset,
                    rows, rank, start, begin, end, K, RUN, PAGE, ALIGNED, VECTOR_ROWS, VECTOR_RANKS, STEP,
                )  # fmt: skip
    else:
        for start in tl.range(block * DOT_RANKS, rank, rank_programs * DOT_RANKS):
            _shrink_dot(
                x_ptr, x_stride, h_ptr, h_stride, pool_ptr, page_stride, pages_ptr, offset,
                rows, rank, start, begin, end, K, RUN, PAGE, ALIGNED, TILE_ROWS, DOT_RANKS, STAGES,
            )  # fmt: skip


@triton.jit
def _shrink_vector(
    x_ptr,
    x_stride,
    h_ptr,
    h_stride,
    pool_ptr,
    page_stride,
    pages_ptr,
    offset,
    rows,
    rank,
    start,
    begin,
    end,
    K: tl.constexpr,
    RUN: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Ranks `start` .. `start + RANKS` of a tile of at most ROWS rows. Each weight is loaded once for all rows."""
    v_V, r_R, c_C = tl.arange(0, ROWS), start + tl.arange(0, RANKS), tl.arange(0, STEP)
    run_U = tl.arange(0, RANKS * STEP // RUN)
    row_U = start + run_U // (STEP // RUN)
    sums_VR = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for k in tl.range(begin, end, STEP):
        live_C = k + c_C < K
        x_C = tl.load(x_ptr + k + c_C, mask=live_C, other=0.0)
        column_U = k + run_U % (STEP // RUN) * RUN
        a_UC = _load_runs(pool_ptr, page_stride, pages_ptr, offset, row_U, column_U, K, rank, RUN, PAGE, ALIGNED)
        a_RC = tl.reshape(a_UC, (RANKS, STEP)).to(tl.float32)
        for row in tl.range(rows):
            next_C = tl.load(x_ptr + (row + 1) * x_stride + k + c_C, mask=live_C & (row + 1 < rows), other=0.0)
            sum_R = tl.sum(a_RC * x_C.to(tl.float32)[None, :], axis=1)
            sums_VR += tl.where(v_V[:, None] == row, sum_R[None, :], 0.0)
            x_C = next_C
    live_VR = (v_V < rows)[:, None] & (r_R < _padded(rank))[None, :]
    tl.store(h_ptr + v_V[:, None] * h_stride + r_R[None, :], sums_VR, mask=live_VR)


@triton.jit
def _shrink_dot(
    x_ptr,
    x_stride,
    h_ptr,
    h_stride,
    pool_ptr,
    page_stride,
    pages_ptr,
    offset,
    rows,
    rank,
    start,
    begin,
    end,
    K: tl.constexpr,
    RUN: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Ranks `start` .. `start + RANKS` of a tile on tensor cores."""
    t_T, r_R, c_C = tl.arange(0, ROWS), start + tl.arange(0, RANKS), tl.arange(0, RUN)
    live_T = t_T < rows
    sums_TR = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for k in tl.range(begin, end, RUN, num_stages=STAGES):
        live_TC = live_T[:, None]
        if not ALIGNED:
            live_TC = live_TC & (k + c_C < K)[None, :]
        x_TC = tl.load(x_ptr + t_T[:, None] * x_stride + (k + c_C)[None, :], mask=live_TC, other=0.0)
        column_R = tl.zeros_like(r_R) + k
        a_RC = _load_runs(pool_ptr, page_stride, pages_ptr, offset, r_R, column_R, K, rank, RUN, PAGE, ALIGNED)
        sums_TR = tl.dot(x_TC, tl.trans(a_RC), sums_TR, input_precision="ieee")
    live_TR = live_T[:, None] & (r_R < _padded(rank))[None, :]
    tl.store(h_ptr + t_T[:, None] * h_stride + r_R[None, :], sums_TR, mask=live_TR)


@triton.jit(do_not_specialize=["num_rows", "num_segments", "layer"])
def _expand_kernel(
    y_ptr,
    y_stride,
    h_ptr,
    pool_ptr,
    page_stride,
    row_start_ptr,
    tables_ptr,
    places_ptr,
    num_rows,
    num_segments,
    layer,
    max_rank,
    FIRST: tl.constexpr,
    SIZES: tl.constexpr,
    OFFSETS: tl.constexpr,
    RUN: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    VECTOR_ROWS: tl.constexpr,
    VECTOR_RANKS: tl.constexpr,
    DOT_RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_CAPACITY: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOT_COLUMNS: tl.constexpr,
):
    """y[rows, block of a slice's columns] += scale * h B."""
    work, tile = tl.program_id(0), tl.program_id(1)
    first, rows, table, place = _row_tile(tile, row_start_ptr, tables_ptr, places_ptr, num_segments, TILE_ROWS)
    if (rows <= 0) | (table == 0):
        return
    slot, block, size, out_offset = 0, work, SIZES[0], OFFSETS[0]
    passed: tl.constexpr = 0
    for i in tl.static_range(1, len(SIZES)):
        passed += (SIZES[i - 1] + COLUMNS - 1) // COLUMNS
        slot = tl.where(work >= passed, i, slot)
        block = tl.where(work >= passed, work - passed, block)
        size = tl.where(work >= passed, SIZES[i], size)
        out_offset = tl.where(work >= passed, OFFSETS[i], out_offset)
    entry_ptr = _pointers(table, tl.int64) + (layer * _COLUMNS + FIRST + slot) * _FIELDS
    offset = tl.load(entry_ptr + 1)
    own_rank = tl.load(entry_ptr + 2)
    scale = tl.load(entry_ptr + 3).to(tl.float64, bitcast=True).to(tl.float32)
    if own_rank == 0:
        return
    scale = tl.where(own_rank > max_rank, float("nan"), scale)
    rank = tl.minimum(own_rank, max_rank).to(tl.int32)
    pages_ptr = _pointers(place, tl.int32)

    column = block * COLUMNS
    y_ptr += first.to(tl.int64) * y_stride + out_offset
    h_stride = len(SIZES) * max_rank
    h_ptr += first.to(tl.int64) * h_stride + slot * max_rank
    split_stride = num_rows.to(tl.int64) * h_stride
    if rows <= VECTOR_ROWS:
        if VECTOR_ROWS > 0:
            _expand_vector(
                y_ptr, y_stride, h_ptr, h_stride, split_stride, pool_ptr, page_stride, pages_ptr, offset,
                rows, rank, scale, column, size, RUN, PAGE, ALIGNED, VECTOR_ROWS, VECTOR_RANKS,
                SPLITS, SPLIT_CAPACITY, COLUMNS,
            )  # fmt: skip
    else:
        for part in tl.range(column, tl.minimum(column + COLUMNS, size), DOT_COLUMNS):
            _expand_dot(
                y_ptr, y_stride, h_ptr, h_stride, split_stride, pool_ptr, page_stride, pages_ptr, offset,
                rows, rank, scale, part, size, RUN, PAGE, ALIGNED, TILE_ROWS, DOT_RANKS, SPLITS, DOT_COLUMNS,
            )  # fmt: skip


@triton.jit
def _expand_vector(
    y_ptr,
    y_stride,
    h_ptr,
    h_stride,
    split_stride,
    pool_ptr,
    page_stride,
    pages_ptr,
    offset,
    rows,
    rank,
    scale,
    column,
    size,
    RUN: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_CAPACITY: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of at most ROWS rows. Each weight is loaded once for all rows."""
    v_V, r_R, n_N = tl.arange(0, ROWS), tl.arange(0, RANKS), tl.arange(0, COLUMNS)
    run_U = tl.arange(0, RANKS * COLUMNS // RUN)
    column_U = column + run_U % (COLUMNS // RUN) * RUN
    target = y_ptr + v_V[:, None] * y_stride + (column + n_N)[None, :]
    live_VN = (v_V < rows)[:, None] & (column + n_N < size)[None, :]
    y_VN = tl.load(target, mask=live_VN, other=0.0)
    sums_VN = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    split_W = tl.arange(0, SPLIT_CAPACITY)
    part_ptr = h_ptr + split_W[:, None] * split_stride + r_R[None, :]
    for start in tl.range(0, rank, RANKS, num_stages=1):
        row_U = start + run_U // (COLUMNS // RUN)
        b_UC = _load_runs(pool_ptr, page_stride, pages_ptr, offset, row_U, column_U, size, rank, RUN, PAGE, ALIGNED)
        live_WR = (split_W < SPLITS)[:, None] & (start + r_R < _padded(rank))[None, :]
        h_WR = tl.load(part_ptr + start, mask=live_WR, other=0.0)
        b_RN = tl.reshape(b_UC, (RANKS, COLUMNS)).to(tl.float32)
        for row in tl.range(rows):
            next_WR = tl.load(part_ptr + (row + 1) * h_stride + start, mask=live_WR & (row + 1 < rows), other=0.0)
            sum_N = tl.sum(b_RN * tl.sum(h_WR, axis=0)[:, None], axis=0)
            sums_VN += tl.where(v_V[:, None] == row, sum_N[None, :], 0.0)
            h_WR = next_WR
    tl.store(target, (y_VN.to(tl.float32) + scale * sums_VN).to(y_ptr.dtype.element_ty), mask=live_VN)


@triton.jit
def _expand_dot(
    y_ptr,
    y_stride,
    h_ptr,
    h_stride,
    split_stride,
    pool_ptr,
    page_stride,
    pages_ptr,
    offset,
    rows,
    rank,
    scale,
    column,
    size,
    RUN: tl.constexpr,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile on tensor cores."""
    t_T, r_R, n_N = tl.arange(0, ROWS), tl.arange(0, RANKS), tl.arange(0, COLUMNS)
    run_U = tl.arange(0, RANKS * COLUMNS // RUN)
    column_U = column + run_U % (COLUMNS // RUN) * RUN
    sums_TN = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in tl.range(0, rank, RANKS, num_stages=1):
        live_TR = (t_T < rows)[:, None] & (start + r_R < _padded(rank))[None, :]
        pointers = h_ptr + t_T[:, None] * h_stride + (start + r_R)[None, :]
        h_TR = _sum_splits(pointers, split_stride, live_TR, SPLITS)
        row_U = start + run_U // (COLUMNS // RUN)
        b_UC = _load_runs(pool_ptr, page_stride, pages_ptr, offset, row_U, column_U, size, rank, RUN, PAGE, ALIGNED)
        sums_TN = _dot_float32(h_TR, tl.reshape(b_UC, (RANKS, COLUMNS)), sums_TN)
    target = y_ptr + t_T[:, None] * y_stride + (column + n_N)[None, :]
    live_TN = (t_T < rows)[:, None] & (column + n_N < size)[None, :]
    y_TN = tl.load(target, mask=live_TN, other=0.0).to(tl.float32)
    tl.store(target, (y_TN + scale * sums_TN).to(y_ptr.dtype.element_ty), mask=live_TN)


@triton.jit
def _sum_splits(pointers, split_stride, live, SPLITS: tl.constexpr):
    """h summed over the splits, in order."""
    h = tl.load(pointers, mask=live, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        pointers += split_stride
        h += tl.load(pointers, mask=live, other=0.0)
    return h


@triton.jit
def _dot_float32(h_TR, b_RN, sums_TN):
    """sums + h b for float32 h, to float32's accuracy: three bfloat16 numbers hold the 24 bits of one float32, and
    their products with bfloat16 b are exact. Rounding h would cost 16 bits; tf32x3 is as many products at half the
    rate."""
    if b_RN.dtype == tl.bfloat16:
        high_TR = h_TR.to(tl.bfloat16)
        rest_TR = h_TR - high_TR.to(tl.float32)
        middle_TR = rest_TR.to(tl.bfloat16)
        low_TR = (rest_TR - middle_TR.to(tl.float32)).to(tl.bfloat16)
        sums_TN = tl.dot(low_TR, b_RN, sums_TN)
        sums_TN = tl.dot(middle_TR, b_RN, sums_TN)
        return tl.dot(high_TR, b_RN, sums_TN)
    else:  # noqa: RET505 - a constexpr branch, of which only one side is compiled
        return tl.dot(h_TR, b_RN, sums_TN, input_precision="ieee")
