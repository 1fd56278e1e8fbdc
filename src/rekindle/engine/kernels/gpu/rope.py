"""Rotary position embedding of queries and keys, and the way of keys and values into their pages, in one kernel.

Shape suffixes: H heads of a program, R half the head size (the pairs that rotate together); for the others see
`interface`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rekindle.engine.kernels.interface import AttentionBatch, AttentionShape, KVPool

_PROGRAM_PAIRS = 1024
"""Pairs per program: four warps whose threads each move 16 bytes of bf16 in either half."""


def rope_and_store(
    qkv_TE: torch.Tensor,
    cos_TD: torch.Tensor,
    sin_TD: torch.Tensor,
    pool: KVPool,
    layer: int,
    batch: AttentionBatch,
    shape: AttentionShape,
) -> None:
    """See `Kernels.rope_and_store`. A row whose slot is negative, such as one that pads a captured graph, is stored
    nowhere."""
    page_stride, layer_stride, token_stride, _, _ = pool.kv_PLBCD.stride()
    num_heads = shape.num_heads + 2 * shape.num_kv_heads
    block_pairs = triton.next_power_of_2(shape.head_dim // 2)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, _PROGRAM_PAIRS // block_pairs))
    _rope_and_store_kernel[(len(qkv_TE), triton.cdiv(num_heads, block_heads))](
        qkv_TE,
        cos_TD,
        sin_TD,
        pool.kv_PLBCD,
        batch.slots_T,
        layer,
        qkv_TE.stride(0),
        cos_TD.stride(0),
        sin_TD.stride(0),
        page_stride,
        layer_stride,
        token_stride,
        NUM_HEADS=shape.num_heads,
        NUM_KV_HEADS=shape.num_kv_heads,
        PAIRS=shape.head_dim // 2,
        PAGE_TOKENS=pool.kv_PLBCD.shape[2],
        BLOCK_HEADS=block_heads,
        BLOCK_PAIRS=block_pairs,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["layer"], do_not_specialize_on_alignment=["slots_T"])
def _rope_and_store_kernel(
    qkv_TE,
    cos_TD,
    sin_TD,
    kv_PLBCD,
    slots_T,
    layer,
    qkv_stride,
    cos_stride,
    sin_stride,
    page_stride,
    layer_stride,
    token_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head_H = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair_R = tl.arange(0, BLOCK_PAIRS)
    in_range_HR = (head_H < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (pair_R < PAIRS)[None, :]
    rotates_HR = (head_H < NUM_HEADS + NUM_KV_HEADS)[:, None] & in_range_HR

    element_HR = head_H[:, None] * (2 * PAIRS) + pair_R[None, :]
    low_at_HR = qkv_TE + row * qkv_stride + element_HR
    old_low_HR = tl.load(low_at_HR, mask=in_range_HR, other=0.0)
    old_high_HR = tl.load(low_at_HR + PAIRS, mask=in_range_HR, other=0.0)
    cos_R = tl.load(cos_TD + row * cos_stride + pair_R, mask=pair_R < PAIRS, other=0.0)
    sin_R = tl.load(sin_TD + row * sin_stride + pair_R, mask=pair_R < PAIRS, other=0.0)
    low_HR, high_HR = old_low_HR.to(tl.float32), old_high_HR.to(tl.float32)
    new_low_HR = (low_HR * cos_R[None, :] - high_HR * sin_R[None, :]).to(old_low_HR.dtype)
    new_high_HR = (high_HR * cos_R[None, :] + low_HR * sin_R[None, :]).to(old_low_HR.dtype)
    tl.store(low_at_HR, new_low_HR, mask=rotates_HR)
    tl.store(low_at_HR + PAIRS, new_high_HR, mask=rotates_HR)

    slot = tl.load(slots_T + row).to(tl.int64)
    stored_HR = in_range_HR & (head_H >= NUM_HEADS)[:, None] & (slot >= 0)
    token_at = (
        kv_PLBCD
        + slot // PAGE_TOKENS * page_stride
        + layer.to(tl.int64) * layer_stride
        + slot % PAGE_TOKENS * token_stride
    )
    kept_at_HR = token_at + element_HR - NUM_HEADS * 2 * PAIRS
    tl.store(kept_at_HR, tl.where(rotates_HR, new_low_HR, old_low_HR), mask=stored_HR)
    tl.store(kept_at_HR + PAIRS, tl.where(rotates_HR, new_high_HR, old_high_HR), mask=stored_HR)
