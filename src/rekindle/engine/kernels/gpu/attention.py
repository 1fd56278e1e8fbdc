"""Causal attention over paged keys and values: split over the context for single rows, tiled over queries for others.

Both ways walk keys in blocks with the online softmax of FlashAttention-2 (arXiv 2307.08691), and give the query heads
that share a kv head to one program, so that its keys and values are read once. A sequence's only row is spread over
several programs, whose partial results a second kernel combines (Flash-Decoding).

What a row's result depends on: its own query, context and keys and values, the model's shape, the kind of GPU, and in
which of the two ways it is computed; never the other sequences, the number of programs, or the width of the page table.
Splits follow from the row's own context and are combined in a fixed order. Blocks of keys are counted from position 0,
and one of which a row sees nothing leaves that row's state as it was, bit for bit, so a row of a tile is the same in
whichever chunk or tile it is computed. A row alone in its step sums in another order; where that must not matter,
`deterministic` has every row computed in tiles, at the price of slow steps over few long sequences.

Nothing on the path of single rows reads the batch's lists or waits for the device, and its launches depend on the
tensors' sizes only: a captured graph may be replayed for any lengths that the page table's width allows. Sequences that
pad it have a context of 0, and their output rows are not written. Kernels are compiled when first launched, which must
come before a capture.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton

from rekindle.engine.kernels.gpu.attention_kernels import combine_kernel, single_row_kernel, tile_kernel
from rekindle.engine.kernels.interface import AttentionBatch, AttentionShape, KVPool

_LOG2_E = math.log2(math.e)
_MIN_DOT_ROWS = 16
_SINGLE_ROW_SHARED_BYTES = 75 * 1024
"""The most a single-row program in bf16 takes (measured for sm_80 and sm_90)."""


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Rows and keys of a tile, and how it is computed."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class _Splitting:
    """A context is split into pieces of `min_tokens`, or longer ones if these would be more than `max_splits`."""

    min_tokens: int
    max_splits: int


def attention(
    qkv_TE: torch.Tensor,
    pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    shape: AttentionShape,
    *,
    deterministic: bool = False,
) -> torch.Tensor:
    """See `Kernels.attention`. `deterministic`: a row's bits do not depend on how its context was cut into steps."""
    num_rows, num_sequences = len(qkv_TE), len(batch.context_S)
    out_TE = qkv_TE.new_empty(num_rows, shape.num_heads * shape.head_dim)
    if deterministic:
        _attend_in_tiles(qkv_TE, out_TE, pool, layer, batch, shape, skip_single_rows=False)
    elif num_rows == num_sequences:
        _attend_single_rows(qkv_TE, out_TE, pool, layer, batch, shape)
    else:
        has_single_rows = any(end - start == 1 for start, end in pairwise(batch.query_start))
        if has_single_rows:
            _attend_single_rows(qkv_TE, out_TE, pool, layer, batch, shape)
        _attend_in_tiles(qkv_TE, out_TE, pool, layer, batch, shape, skip_single_rows=has_single_rows)
    return out_TE


def _attend_single_rows(
    qkv_TE: torch.Tensor, out_TE: torch.Tensor, pool: KVPool, layer: int, batch: AttentionBatch, shape: AttentionShape
) -> None:
    blocks, splitting = _single_row_blocks(shape, qkv_TE.dtype), _splitting(shape)
    num_sequences, table_width = batch.pages_SM.shape
    longest = table_width * pool.kv_PLBCD.shape[2]
    if shape.window > 0:
        longest = min(longest, shape.window + blocks.keys)  # the first block may begin before the window
    table_splits = min(splitting.max_splits, triton.cdiv(longest, splitting.min_tokens))
    partial_SWHD = qkv_TE.new_empty((num_sequences, table_splits, shape.num_heads, shape.head_dim), dtype=torch.float32)
    weight_SWH = qkv_TE.new_empty((num_sequences, table_splits, shape.num_heads), dtype=torch.float32)
    max_pieces = num_sequences * table_splits * shape.num_kv_heads
    num_programs = min(max_pieces, _num_resident_programs(qkv_TE.device))
    single_row_kernel[(num_programs,)](
        qkv_TE,
        pool.kv_PLBCD,
        out_TE,
        partial_SWHD,
        weight_SWH,
        batch.query_start_S1,
        batch.context_S,
        batch.pages_SM,
        num_sequences,
        layer,
        table_splits,
        qkv_TE.stride(0),
        batch.pages_SM.stride(0),
        *pool.kv_PLBCD.stride()[:3],
        shape.window,
        *_score_factors(shape),
        MIN_SPLIT_TOKENS=splitting.min_tokens,
        MAX_SPLITS=splitting.max_splits,
        **_constants(pool, shape, blocks),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    if table_splits > 1:
        combine_kernel[(num_sequences, shape.num_heads)](
            out_TE,
            partial_SWHD,
            weight_SWH,
            batch.query_start_S1,
            batch.context_S,
            table_splits,
            shape.window,
            NUM_HEADS=shape.num_heads,
            HEAD_DIM=shape.head_dim,
            BLOCK_DIM=_padded_dim(shape),
            BLOCK_KEYS=blocks.keys,
            MIN_SPLIT_TOKENS=splitting.min_tokens,
            MAX_SPLITS=splitting.max_splits,
            HAS_WINDOW=shape.window > 0,
            num_warps=4,
        )


def _attend_in_tiles(
    qkv_TE: torch.Tensor,
    out_TE: torch.Tensor,
    pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    shape: AttentionShape,
    *,
    skip_single_rows: bool,
) -> None:
    blocks = _tile_blocks(shape, qkv_TE.dtype)
    num_rows, num_sequences = len(qkv_TE), len(batch.context_S)
    queries = blocks.rows // (shape.num_heads // shape.num_kv_heads)
    max_tiles = min(num_rows, num_rows // queries + num_sequences)  # at most one tile of a sequence is not full
    tile_kernel[(max_tiles * shape.num_kv_heads,)](
        qkv_TE,
        pool.kv_PLBCD,
        out_TE,
        batch.query_start_S1,
        batch.context_S,
        batch.pages_SM,
        num_sequences,
        layer,
        qkv_TE.stride(0),
        batch.pages_SM.stride(0),
        *pool.kv_PLBCD.stride()[:3],
        shape.window,
        *_score_factors(shape),
        SKIP_SINGLE_ROWS=skip_single_rows,
        **_constants(pool, shape, blocks),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )


def _single_row_blocks(shape: AttentionShape, dtype: torch.dtype) -> _Blocks:
    """A block of keys is 16 KiB, and as much of values. With two of each, one loading while the other is used, a
    multiprocessor of an H100 has room for three programs, which keep 96 KiB in flight."""
    group = shape.num_heads // shape.num_kv_heads
    keys = 16384 // (_padded_dim(shape) * dtype.itemsize)
    return _Blocks(max(_MIN_DOT_ROWS, triton.next_power_of_2(group)), min(max(keys, 16), 128), 4, 3)


def _tile_blocks(shape: AttentionShape, dtype: torch.dtype) -> _Blocks:
    """The largest tiles that leave every value in registers: Hopper's matrix instructions read operands from shared
    memory, which earlier GPUs hold in registers too."""
    has_wide_heads = _padded_dim(shape) > 128
    if dtype.itemsize > 2:  # no tensor cores; for comparisons, not for speed
        return _Blocks(32, 16, 8, 1)
    if _has_warpgroup_instructions():
        return _Blocks(128, 32, 8, 2) if has_wide_heads else _Blocks(128, 64, 8, 3)
    return _Blocks(64, 32, 8, 2) if has_wide_heads else _Blocks(128, 32, 8, 3)


def _splitting(shape: AttentionShape) -> _Splitting:
    """Enough programs to fill a GPU with a single sequence: the fewer the kv heads, the more splits."""
    return _Splitting(256, 32) if shape.num_kv_heads >= 8 else _Splitting(128, 64)


def _score_factors(shape: AttentionShape) -> tuple[float, float, float]:
    """What a product of query and key is multiplied by before the soft cap, the cap, and what a score is multiplied by
    to become an exponent of 2."""
    if shape.softcap > 0:
        return 2 * _LOG2_E * shape.scale / shape.softcap, shape.softcap, _LOG2_E
    return 1.0, 0.0, shape.scale * _LOG2_E


def _constants(pool: KVPool, shape: AttentionShape, blocks: _Blocks) -> dict[str, int | bool]:
    return {
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.num_heads // shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "PAGE_TOKENS": pool.kv_PLBCD.shape[2],
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_KEYS": blocks.keys,
        "BLOCK_DIM": _padded_dim(shape),
        "HAS_WINDOW": shape.window > 0,
        "HAS_SOFTCAP": shape.softcap > 0,
    }


def _padded_dim(shape: AttentionShape) -> int:
    return max(_MIN_DOT_ROWS, int(triton.next_power_of_2(shape.head_dim)))


@functools.cache
def _has_warpgroup_instructions() -> bool:
    is_interpreted = triton.knobs.runtime.interpret
    return is_interpreted or bool(triton.runtime.driver.active.get_current_target().arch >= 90)


@functools.cache
def _num_resident_programs(device: torch.device) -> int:
    """How many single-row programs a GPU runs at once. The interpreter has few, each with several pieces of work."""
    if device.type != "cuda":
        return 4
    properties = torch.cuda.get_device_properties(device)
    per_multiprocessor = properties.shared_memory_per_multiprocessor // _SINGLE_ROW_SHARED_BYTES
    return properties.multi_processor_count * max(1, per_multiprocessor)
