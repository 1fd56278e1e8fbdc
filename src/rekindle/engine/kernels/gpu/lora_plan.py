"""How a low-rank update is cut into programs: a pure function of sizes. See `kernels.gpu.lora` for the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

RUN = 64
"""Elements that never straddle a page, if a matrix's rows are multiples of them."""

_DEFAULT_SMS = 132
_VECTOR_PROGRAMS_PER_SM = 8
"""Memory-bound programs hold 16 KiB of loads each; eight of them keep an H100's memory busy over their waits."""

_DOT_PROGRAMS_PER_SM = 2
_MAX_SPLITS = 8
_MAX_STEP = 1024
_LONG_SEGMENT = 64
"""Rows from which on a segment is worth large tiles."""


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """Sizes of the two launches.

    `rank_programs` programs share a tile's ranks, for each of `splits` parts of K of `chunk` features. `vector_*` and
    `expand_ranks` shape tiles of up to `vector_rows` rows, `dot_ranks` the others; `columns` is an expand program's part
    of a slice, `stages` the depth of the software pipeline over K.
    """

    num_tiles: int
    tile_rows: int
    vector_rows: int
    max_rank: int
    rank_programs: int
    chunk: int
    splits: int
    vector_ranks: int
    vector_step: int
    expand_ranks: int
    dot_ranks: int
    columns: int
    stages: int
    num_warps: int = 4


def make_plan(
    *,
    num_rows: int,
    num_segments: int,
    segment_rows: Sequence[int] | None,
    max_rank: int,
    in_features: int,
    out_sizes: tuple[int, ...],
    dtype: torch.dtype,
    num_sms: int | None,
    deterministic: bool,
) -> LoraPlan | None:
    """The plan for these sizes, None if there is nothing to do.

    `segment_rows` are the rows of each segment, 0 where the base serves them; without it, the plan holds for any
    division of `num_rows` rows into `num_segments` segments. A deterministic plan cuts no sum differently for any rows,
    segments or ranks.
    """
    if num_rows == 0 or num_segments == 0 or max_rank == 0:
        return None
    longest = 0 if segment_rows is None else max(segment_rows)
    if segment_rows is not None and longest == 0:
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
    vector_ranks = 8
    dot_ranks = (32 if tile_rows == 16 or max_rank <= 32 else 64) if is_half else 16
    step = min(_MAX_STEP if is_aligned else _MAX_STEP // 4, max(RUN, _power_of_two(in_features)))
    sms = num_sms or _DEFAULT_SMS
    rank_blocks = _ceil(max_rank, vector_ranks)
    tiles = num_tiles * len(out_sizes)
    wanted = sms * _VECTOR_PROGRAMS_PER_SM
    rank_programs = min(rank_blocks, max(4, wanted // tiles))
    if tile_rows > 16:
        wanted, tiles = sms * _DOT_PROGRAMS_PER_SM, tiles * _ceil(max_rank, dot_ranks)
    else:
        tiles *= rank_programs
    splits = _MAX_SPLITS if deterministic else min(_MAX_SPLITS, _power_of_two_below(wanted // tiles))
    chunk = _ceil(_ceil(in_features, splits), step) * step
    return LoraPlan(
        num_tiles=num_tiles,
        tile_rows=tile_rows,
        vector_rows=0 if deterministic else 4,
        max_rank=max_rank,
        rank_programs=rank_programs,
        chunk=chunk,
        splits=_ceil(in_features, chunk),
        vector_ranks=vector_ranks,
        vector_step=step,
        expand_ranks=16,
        dot_ranks=dot_ranks,
        columns=(128 if tile_rows > 16 or deterministic else 256) if is_half and is_aligned else 64,
        stages=5,
    )


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _power_of_two_below(number: int) -> int:
    return 1 << max(number.bit_length() - 1, 0)
