"""Adapters of random matrices in the pages of a pool, scattered in random order, as they lie on a GPU."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rekindle.engine.kernels.gpu.lora import GroupedLora
from rekindle.engine.kernels.interface import (
    LORA_FIELDS,
    PROJECTIONS,
    AdapterMatrices,
    LoraBatch,
    LoraGroup,
    make_lora_batch,
)

ALIGNMENT = 64
NUM_LAYERS = 2


@dataclass(frozen=True)
class Segment:
    """Rows of one adapter. Without ranks they are the base's, else there is one rank per projection of the group, where
    0 leaves that projection alone."""

    rows: int
    ranks: tuple[int, ...] | None


class BoundLora(GroupedLora):
    """The kernels as a graph captures them, for adapters up to `max_rank`; or as they are, without it."""

    def __init__(self, max_rank: int | None = None, *, deterministic: bool = False) -> None:
        super().__init__(deterministic=deterministic)
        self._max_rank = max_rank

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        if self._max_rank is not None:
            batch = replace(batch, adapters=(), max_rank=self._max_rank)
        super().lora(x_TK, y_TN, batch, layer, group)


def paged_lora(
    segments: Sequence[Segment],
    in_features: int,
    out_sizes: tuple[int, ...],
    *,
    dtype: torch.dtype,
    device: torch.device,
    page_elements: int = 320,
    base_rows: int = 0,
    first: int = 0,
    seed: int = 0,
) -> tuple[LoraBatch, LoraGroup]:
    """A batch whose adapters change layer `NUM_LAYERS - 1`, and the group of projections `first ..`.

    Every element that belongs to no matrix is NaN, pages are further apart than they are long, and matrices begin at
    multiples of 64 elements that rarely are multiples of a page.
    """
    generator = torch.Generator().manual_seed(seed)
    tables: list[torch.Tensor | None] = []
    vectors: list[torch.Tensor] = []
    for segment in segments:
        if segment.ranks is None:
            tables.append(None)
            continue
        table, vector = _adapter(segment.ranks, in_features, out_sizes, first, generator)
        tables.append(table)
        vectors.append(vector)
    counts = [-(-len(vector) // page_elements) for vector in vectors]
    order = torch.randperm(sum(counts) + 3, generator=generator).to(torch.int32)
    pool_PX = torch.full((len(order), page_elements + ALIGNMENT), torch.nan)[:, :page_elements]
    lists = order[: sum(counts)].split(counts)
    for vector, pages in zip(vectors, lists, strict=True):
        padding = torch.full((len(pages) * page_elements - len(vector),), torch.nan)
        pool_PX[pages] = torch.cat([vector, padding]).view(len(pages), page_elements)
    starts = [base_rows]
    for segment in segments:
        starts.append(starts[-1] + segment.rows)
    remaining = iter(lists)
    adapters = [
        None
        if table is None
        else AdapterMatrices(table.to(device), int(table[..., 2].max()), pages_M=next(remaining).to(device))
        for table in tables
    ]
    padded_PX = pool_PX.as_strided((len(order), pool_PX.stride(0)), pool_PX.stride()).to(device, dtype)
    offsets = tuple(sum(out_sizes[:i]) for i in range(len(out_sizes)))
    return make_lora_batch(starts, adapters, padded_PX[:, :page_elements]), LoraGroup(first, offsets, out_sizes)


def _adapter(
    ranks: tuple[int, ...], in_features: int, out_sizes: tuple[int, ...], first: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table and the vector of one adapter; A and B are scaled so that updates are of the size of their inputs."""
    table_LPF = torch.zeros(NUM_LAYERS + 1, len(PROJECTIONS), LORA_FIELDS, dtype=torch.int64)
    pieces = [torch.full((ALIGNMENT,), torch.nan)]
    begin = ALIGNMENT
    for i, (rank, size) in enumerate(zip(ranks, out_sizes, strict=True)):
        if rank == 0:
            continue
        scale = 0.5 + torch.rand(1, generator=generator, dtype=torch.float64).item()
        entry = []
        for columns, spread in ((in_features, in_features**-0.5), (size, rank**-0.5)):
            entry.append(begin)
            count = rank * columns
            padding = -count % ALIGNMENT
            pieces += [torch.randn(count, generator=generator) * spread, torch.full((padding,), torch.nan)]
            begin += count + padding
        (scale_bits,) = struct.unpack("q", struct.pack("d", scale))
        table_LPF[NUM_LAYERS - 1, first + i] = torch.tensor([*entry, rank, scale_bits])
    return table_LPF, torch.cat(pieces)
