"""The specification of every kernel in plain torch: slow, obvious, and what every other kernel is tested against."""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F

from rekindle.engine.arena import OWN_ARENA, Arena
from rekindle.engine.kernels.interface import (
    AdapterMatrices,
    AttentionBatch,
    AttentionShape,
    KVPool,
    LoraBatch,
    LoraGroup,
    PackedLinear,
    Rows,
)
from rekindle.engine.kernels.linear import PLAIN, LinearOps
from rekindle.errors import InternalError


class ReferenceKernels:
    """See `Kernels` for the contract of each operation."""

    def __init__(self, linear: LinearOps = PLAIN) -> None:
        self._linear = linear

    layout: str | None = None

    def pack_linear(self, weight_NK: Rows, bias_N: Rows | None, arena: Arena = OWN_ARENA) -> PackedLinear:
        return self._linear.pack(weight_NK, bias_N)

    def multiply(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        return self._linear.multiply(x_TK, weight_NK)

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        x = x_TH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return (x * weight_H).to(dtype or x_TH.dtype)

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual_TH += x_TH
        return self.rms_norm(residual_TH, weight_H, eps, x_TH.dtype)

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
        heads = qkv_TE.view(len(qkv_TE), -1, shape.head_dim)
        rotated = heads[:, : shape.num_heads + shape.num_kv_heads]
        low, high = rotated.float().chunk(2, dim=-1)
        cos, sin = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
        rotated.copy_(torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1))
        page_tokens = pool.kv_PLBCD.shape[2]
        pages, offsets = batch.slots_T // page_tokens, batch.slots_T % page_tokens
        pool.kv_PLBCD[pages, layer, offsets] = heads[:, shape.num_heads :]

    def attention(
        self, qkv_TE: torch.Tensor, pool: KVPool, layer: int, batch: AttentionBatch, shape: AttentionShape
    ) -> torch.Tensor:
        num_q, num_kv, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        out = qkv_TE.new_empty(len(qkv_TE), num_q * dim)
        for s, context in enumerate(batch.context):
            rows = slice(batch.query_start[s], batch.query_start[s + 1])
            kv = pool.kv_PLBCD[batch.pages_SM[s].long(), layer].flatten(0, 1)[:context].float()
            keys, values = kv[:, :num_kv], kv[:, num_kv:]
            queries = qkv_TE[rows, : num_q * dim].float().view(-1, num_kv, num_q // num_kv, dim)
            scores = torch.einsum("qkgd,ckd->kgqc", queries, keys) * shape.scale
            if shape.softcap:
                scores = torch.tanh(scores / shape.softcap) * shape.softcap
            scores = scores.masked_fill(~visible(rows.stop - rows.start, context, shape.window, out.device), -torch.inf)
            mixed = torch.einsum("kgqc,ckd->qkgd", scores.softmax(-1), values)
            out[rows] = mixed.flatten(1).to(out.dtype)
        return out

    def gated_activation(self, gate_up_TF: torch.Tensor, activation: str) -> torch.Tensor:
        gate, up = gate_up_TF.float().chunk(2, dim=-1)
        gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        return (gate * up).to(gate_up_TF.dtype)

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        for g, adapter in enumerate(batch.adapters):
            if adapter is None:
                continue
            vector = vector_of(adapter, batch.pool_PX)
            rows = slice(batch.row_start[g], batch.row_start[g + 1])
            for i, (offset, size) in enumerate(zip(group.out_offsets, group.out_sizes, strict=True)):
                a_offset, b_offset, rank, scale_bits = adapter.table_LPF[layer, group.first + i].tolist()
                if rank == 0:
                    continue
                (scale,) = struct.unpack("d", struct.pack("q", scale_bits))
                a_RK = _matrix(vector, a_offset, rank, x_TK.shape[1]).float()
                b_RN = _matrix(vector, b_offset, rank, size).float()
                delta = (x_TK[rows].float() @ a_RK.T) @ b_RN * scale
                target = y_TN[rows, offset : offset + size]
                target.copy_(target.float() + delta)


def visible(num_queries: int, context: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [queries, context]: which keys each of the last `num_queries` positions of a context may see."""
    query_position = torch.arange(context - num_queries, context, device=device).unsqueeze(1)
    distance = query_position - torch.arange(context, device=device)
    mask = distance >= 0
    return mask & (distance < window) if window else mask


def vector_of(adapter: AdapterMatrices, pool_PX: torch.Tensor | None) -> torch.Tensor:
    """An adapter's flat vector: a view of mapped memory, or gathered from its pages."""
    if adapter.vector is not None:
        return adapter.vector
    if adapter.pages_M is None or pool_PX is None:
        raise InternalError("an adapter's matrices are neither mapped nor in pages")
    return pool_PX[adapter.pages_M].flatten()


def _matrix(vector: torch.Tensor, offset: int, rows: int, columns: int) -> torch.Tensor:
    return vector[offset : offset + rows * columns].view(rows, columns)
