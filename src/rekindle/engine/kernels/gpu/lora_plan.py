"""How a low-rank update is cut into programs: a pure function of sizes. See `kernels.gpu.lora` for the words."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

RUN = 64
"""Elements that never straddle a page, if a matrix's rows are multiples of them."""

_VECTOR_PROGRAMS_PER_SM = 8
"""Memory-bound programs have 16 KiB of loads in flight; a multiprocessor holds four at a time."""

_DOT_PROGRAMS_PER_SM = 2
_MAX_SPLITS = 8
_VECTOR_RANKS = 8
_MAX_STEP = 1024
_LONG_SEGMENT = 64
"""Rows from which on a segment is worth large tiles."""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Sizes of the two launches.

    `rank_programs` programs share a tile's ranks, for each of `splits` parts of K of `chunk` features, and each program
    of the second launch does `columns` columns of a slice. Tiles of up to `vector_rows` rows load blocks of
    [`vector_ranks`, `vector_step`] weights of A and [`expand_ranks`, `columns`] of B; the others [`dot_ranks`, 64]
    through `stages` stages, and [`expand_dot_ranks`, `dot_columns`].
    """

    num_tiles: int
    tile_rows: int
    vector_rows: int
    max_rank: int
    rank_programs: int
    chunk: int
    splits: int
    columns: int
    vector_ranks: int
    vector_step: int
    expand_ranks: int
    dot_ranks: int
    expand_dot_ranks: int
    dot_columns: int
    stages: int
    num_warps: int = 4


@functools.lru_cache(maxsize=4096)
def make_plan(
    *,
    num_rows: int,
    num_segments: int,
    segment_rows: tuple[int, ...] | None,
    max_rank: int,
    in_features: int,
    out_sizes: tuple[int, ...],
    dtype: torch.dtype,
    num_sms: int,
    deterministic: bool,
) -> LoraPlan | None:
    """The plan for these sizes, None if there is nothing to do.

    `segment_rows` are the rows of each segment, 0 where the base serves them; without it, the plan holds for any
    division of `num_rows` rows into `num_segments` segments. A deterministic plan cuts no sum differently for any rows,
    segments or ranks.
    """
    longest = max(segment_rows or (0,))
    if num_rows == 0 or num_segments == 0 or max_rank == 0 or (segment_rows is not None and longest == 0):
        return None
    is_half = dtype == torch.bfloat16
    is_aligned = in_features % RUN == 0 and all(size % RUN == 0 for size in out_sizes)
    tile_rows = 64 if is_half and is_aligned and longest >= _LONG_SEGMENT and not deterministic else 16
    if segment_rows is None:
        further = (num_rows - 1) // tile_rows
    else:
        further = sum(max(_ceil(rows, tile_rows) - 1, 0) for rows in segment_rows)
    num_tiles = num_segments + further

    max_rank = _ceil(max_rank, 16) * 16
    dot_ranks = (32 if tile_rows == 16 or max_rank <= 32 else 64) if is_half else 16
    step = min(_MAX_STEP if is_aligned else _MAX_STEP // 4, max(RUN, _power_of_two(in_features)))
    programs, wanted = num_tiles * len(out_sizes), num_sms * _VECTOR_PROGRAMS_PER_SM
    rank_programs = min(_ceil(max_rank, _VECTOR_RANKS), max(4, wanted // programs))
    if tile_rows > 16:
        programs, wanted = programs * _ceil(max_rank, dot_ranks), num_sms * _DOT_PROGRAMS_PER_SM
    else:
        programs *= rank_programs
    splits = _MAX_SPLITS if deterministic else min(_MAX_SPLITS, _power_of_two_below(wanted // programs))
    chunk = _ceil(_ceil(in_features, splits), step) * step

    dot_columns = 128 if is_half and is_aligned else 64
    columns = dot_columns
    if is_half and is_aligned and tile_rows == 16 and not deterministic:
        columns = 512 if num_tiles * sum(out_sizes) >= 512 * wanted else 256
    return LoraPlan(
        num_tiles=num_tiles,
        tile_rows=tile_rows,
        vector_rows=0 if deterministic else 4,
        max_rank=max_rank,
        rank_programs=rank_programs,
        chunk=chunk,
        splits=_ceil(in_features, chunk),
        columns=columns,
        vector_ranks=_VECTOR_RANKS,
        vector_step=step,
        expand_ranks=16 if columns == 512 else 32,
        dot_ranks=dot_ranks,
        expand_dot_ranks=min(dot_ranks, 32),
        dot_columns=dot_columns,
        stages=5 if is_aligned else 1,
    )


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _power_of_two_below(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)
