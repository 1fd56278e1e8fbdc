"""The operations of a forward pass on a GPU, joined."""

from __future__ import annotations

import torch

from rekindle.engine.arena import OWN_ARENA, Arena
from rekindle.engine.kernels.gpu.attention import attention
from rekindle.engine.kernels.gpu.lora import GroupedLora
from rekindle.engine.kernels.gpu.rope import rope_and_store
from rekindle.engine.kernels.gpu.rowwise import add_rms_norm, gated_activation, rms_norm
from rekindle.engine.kernels.interface import (
    AttentionBatch,
    AttentionShape,
    KVPool,
    LoraBatch,
    LoraGroup,
    PackedLinear,
    Rows,
)
from rekindle.engine.kernels.linear import LinearOps


class TritonKernels:
    """See `Kernels` for the contract of each operation. Matrix products are `linear`'s.

    With `deterministic`, attention and low-rank updates depend neither on the batch nor on how a context was cut into
    steps; that of the whole pass also takes deterministic `linear`. Row-wise operations never depend on the batch.
    """

    def __init__(self, linear: LinearOps, *, deterministic: bool = False) -> None:
        self._linear, self._deterministic = linear, deterministic
        self._lora = GroupedLora(deterministic=deterministic)

    layout: str | None = None

    def pack_linear(self, weight_NK: Rows, bias_N: Rows | None, arena: Arena = OWN_ARENA) -> PackedLinear:
        return self._linear.pack(weight_NK, bias_N)

    def multiply(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return self._linear.multiply(x_TK, weight_NK)

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        return rms_norm(x_TH, weight_H, eps, dtype)

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return add_rms_norm(x_TH, residual_TH, weight_H, eps)

    def rope_and_store(
        self,
        qkv_TE: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        pool: KVPool,
        layer: int,
        batch: AttentionBatch,
        shape: AttentionShape,
    ) -> None:
        rope_and_store(qkv_TE, cos_TD, sin_TD, pool, layer, batch, shape)

    def attention(
        self, qkv_TE: torch.Tensor, pool: KVPool, layer: int, batch: AttentionBatch, shape: AttentionShape
    ) -> torch.Tensor:
        return attention(qkv_TE, pool, layer, batch, shape, deterministic=self._deterministic)

    def gated_activation(self, gate_up_TF: torch.Tensor, activation: str) -> torch.Tensor:
        return gated_activation(gate_up_TF, activation)

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        self._lora.lora(x_TK, y_TN, batch, layer, group)
