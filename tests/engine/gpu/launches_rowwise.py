"""Norms and activations at the sizes of real models, the head size and the longest row included."""

import torch

from rekindle.engine.kernels.gpu.rowwise import MAX_NORM_SIZE, add_rms_norm, gated_activation, rms_norm

CASES = [(64, torch.bfloat16), (2304, torch.bfloat16), (MAX_NORM_SIZE, torch.bfloat16), (MAX_NORM_SIZE, torch.float32)]


def norms(size: int, dtype: torch.dtype) -> None:
    x, residual, weight = torch.ones(4, size, dtype=dtype), torch.ones(4, size), torch.ones(size)
    rms_norm(x, weight, 1e-5)
    rms_norm(residual, weight, 1e-5, dtype)
    add_rms_norm(x, residual, weight, 1e-5)


LAUNCHES = {f"norms of {size} {dtype}": lambda size=size, dtype=dtype: norms(size, dtype) for size, dtype in CASES} | {
    activation: lambda activation=activation: gated_activation(torch.ones(4, 2 * 1536).bfloat16(), activation)
    for activation in ("silu", "gelu_tanh")
}
