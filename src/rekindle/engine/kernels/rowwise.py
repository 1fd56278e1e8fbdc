"""Batch-invariant kernels in plain torch: whatever mixes rows is done one row at a time.

Slow; used for `deterministic` serving only where the native kernels, which are batch-invariant by construction, are not
available.
"""

from __future__ import annotations

import torch

from rekindle.engine.kernels.interface import (
    AttentionBatch,
    AttentionShape,
    KVPool,
    LoraBatch,
    LoraGroup,
    make_lora_batch,
)
from rekindle.engine.kernels.reference import ReferenceKernels


class RowwiseKernels(ReferenceKernels):
    """The specification, applied row by row."""

    def attention(
        self, qkv_TE: torch.Tensor, pool: KVPool, layer: int, batch: AttentionBatch, shape: AttentionShape
    ) -> torch.Tensor:
        rows = [
            super(RowwiseKernels, self).attention(qkv_TE[row : row + 1], pool, layer, _one(batch, s, context), shape)
            for s in range(len(batch.context))
            for row, context in _rows_of(batch, s)
        ]
        return torch.cat(rows)

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        for g, adapter in enumerate(batch.adapters):
            one = make_lora_batch([0, 1], [adapter], batch.pool_PX)
            for row in range(batch.row_start[g], batch.row_start[g + 1]):
                super().lora(x_TK[row : row + 1], y_TN[row : row + 1], one, layer, group)


def _rows_of(batch: AttentionBatch, s: int) -> list[tuple[int, int]]:
    """(row, context seen by that row) of each query of sequence s."""
    start, end = batch.query_start[s], batch.query_start[s + 1]
    return [(row, batch.context[s] - (end - 1 - row)) for row in range(start, end)]


def _one(batch: AttentionBatch, s: int, context: int) -> AttentionBatch:
    """The batch of a single query row of sequence s."""
    return AttentionBatch(
        query_start=[0, 1],
        context=[context],
        query_start_S1=torch.tensor([0, 1], dtype=torch.int32),
        context_S=torch.tensor([context], dtype=torch.int32),
        pages_SM=batch.pages_SM[s : s + 1],
        slots_T=batch.slots_T[:1],
    )
