"""Norms and the gated activation: memory-bound, so each reads its operands once and writes its result once.

A row is held in registers whole. How many rows share a program follows from the row's length alone, and so no result
depends on the batch. Suffixes: R rows of a program, C columns of a block; for the others see `interface`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_NORM_SIZE = 16384
"""The longest row to be normed: 32 values a thread."""

_PROGRAM_ELEMENTS = 1024
"""Elements that short rows are gathered to: four warps whose threads each move 16 bytes of bf16."""

_THREAD_ELEMENTS = 16
"""Elements of a long row per thread: two 16-byte accesses of bf16 in flight."""

_GATED_COLUMNS = 1024


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """See `Kernels.rms_norm`. Two or three dimensions may have any strides but for the last, which is dense."""
    shape, size = x_TH.shape, x_TH.shape[-1]
    out_TH = x_TH.new_empty(shape, dtype=dtype or x_TH.dtype)
    x = x_TH if len(shape) in (2, 3) else x_TH.reshape(-1, size)
    inner_rows = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * inner_rows
    block_rows, block_size, num_warps = _norm_blocks(size)
    if num_rows:
        _rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
            x,
            weight_H,
            out_TH,
            num_rows,
            inner_rows,
            x.stride(0),
            x.stride(-2),
            size,
            eps,
            BLOCK_ROWS=block_rows,
            BLOCK_SIZE=block_size,
            num_warps=num_warps,
        )
    return out_TH


def add_rms_norm(x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Kernels.add_rms_norm`."""
    num_rows, size = x_TH.shape
    out_TH = x_TH.new_empty(num_rows, size)
    block_rows, block_size, num_warps = _norm_blocks(size)
    if num_rows:
        _add_rms_norm_kernel[(triton.cdiv(num_rows, block_rows),)](
            x_TH,
            residual_TH,
            weight_H,
            out_TH,
            num_rows,
            x_TH.stride(0),
            residual_TH.stride(0),
            size,
            eps,
            BLOCK_ROWS=block_rows,
            BLOCK_SIZE=block_size,
            num_warps=num_warps,
        )
    return out_TH


def gated_activation(gate_up_TF: torch.Tensor, activation: str) -> torch.Tensor:
    """See `Kernels.gated_activation`."""
    num_rows, size = gate_up_TF.shape[0], gate_up_TF.shape[1] // 2
    out_TF = gate_up_TF.new_empty(num_rows, size)
    if num_rows:
        _gated_activation_kernel[(num_rows, triton.cdiv(size, _GATED_COLUMNS))](
            gate_up_TF,
            out_TF,
            gate_up_TF.stride(0),
            size,
            IS_SILU=activation == "silu",
            BLOCK_COLUMNS=_GATED_COLUMNS,
            num_warps=4,
        )
    return out_TF


def _norm_blocks(size: int) -> tuple[int, int, int]:
    """Rows of a program, columns of its block, and its warps."""
    if size > MAX_NORM_SIZE:
        raise ValueError(f"a norm over {size} elements does not fit a program: at most {MAX_NORM_SIZE} do")
    block_size = triton.next_power_of_2(size)
    block_rows = max(1, _PROGRAM_ELEMENTS // block_size)
    return block_rows, block_size, min(16, max(4, block_size // (_THREAD_ELEMENTS * 32)))


@triton.jit
def _normed(x_RC, weight, column_C, in_row_C, size, eps):
    mean_R = tl.sum(x_RC * x_RC, axis=1) / size
    weight_C = tl.load(weight + column_C, mask=in_row_C, other=0.0)
    return x_RC * tl.rsqrt(mean_R + eps)[:, None] * weight_C[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,
    weight,
    out,
    num_rows,
    inner_rows,
    outer_stride,
    inner_stride,
    size,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_C = tl.arange(0, BLOCK_SIZE)
    in_row_C = column_C < size
    mask_RC = (row_R < num_rows)[:, None] & in_row_C[None, :]
    start_R = row_R // inner_rows * outer_stride + row_R % inner_rows * inner_stride
    x_RC = tl.load(x + start_R[:, None] + column_C[None, :], mask=mask_RC, other=0.0).to(tl.float32)
    normed_RC = _normed(x_RC, weight, column_C, in_row_C, size, eps)
    tl.store(out + row_R[:, None] * size + column_C[None, :], normed_RC, mask=mask_RC)


@triton.jit(do_not_specialize=["num_rows"])
def _add_rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    num_rows,
    x_stride,
    residual_stride,
    size,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column_C = tl.arange(0, BLOCK_SIZE)
    in_row_C = column_C < size
    mask_RC = (row_R < num_rows)[:, None] & in_row_C[None, :]
    x_RC = tl.load(x + row_R[:, None] * x_stride + column_C[None, :], mask=mask_RC, other=0.0).to(tl.float32)
    residual_at_RC = residual + row_R[:, None] * residual_stride + column_C[None, :]
    sum_RC = tl.load(residual_at_RC, mask=mask_RC, other=0.0) + x_RC
    tl.store(residual_at_RC, sum_RC, mask=mask_RC)
    normed_RC = _normed(sum_RC, weight, column_C, in_row_C, size, eps)
    tl.store(out + row_R[:, None] * size + column_C[None, :], normed_RC, mask=mask_RC)


@triton.jit
def _gated_activation_kernel(gate_up, out, row_stride, size, IS_SILU: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column_C = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask_C = column_C < size
    gate_at_C = gate_up + row * row_stride + column_C
    gate_C = tl.load(gate_at_C, mask=mask_C, other=0.0).to(tl.float32)
    up_C = tl.load(gate_at_C + size, mask=mask_C, other=0.0).to(tl.float32)
    # (1 + tanh(z)) / 2 is sigmoid(2 z), and so both activations are gate * sigmoid(slope).
    slope_C = gate_C if IS_SILU else 1.5957691216057308 * (gate_C + 0.044715 * gate_C * gate_C * gate_C)
    tl.store(out + row * size + column_C, gate_C * tl.sigmoid(slope_C) * up_C, mask=mask_C)
