"""The joined operations, called as a model calls them: one layer without its low-rank updates."""

import pytest
import torch

from rekindle.engine.kernels.gpu.triton_kernels import TritonKernels
from rekindle.engine.kernels.interface import AttentionShape, Kernels, TensorRows
from rekindle.engine.kernels.linear import BATCH_INVARIANT, PLAIN
from rekindle.engine.kernels.reference import ReferenceKernels
from support.paged import attention_batch, kv_pool, random


def layer(kernels: Kernels, device: torch.device) -> torch.Tensor:
    shape, hidden = AttentionShape(4, 2, 16, 0.25), 48
    batch, num_pages = attention_batch([3, 1, 5], [20, 9, 5], 8, device)
    pool = kv_pool(num_pages, 1, 8, shape, torch.float32, device)

    def weight(*size: int, seed: int) -> torch.Tensor:
        return (random(*size, dtype=torch.float32, seed=seed) * size[-1] ** -0.5).to(device)

    residual = random(9, hidden, dtype=torch.float32).to(device)
    angles = random(9, 8, dtype=torch.float32, seed=1).to(device)
    norm = torch.ones(hidden, device=device)
    qkv = kernels.pack_linear(TensorRows(weight(128, hidden, seed=2)), TensorRows(weight(1, 128, seed=3)[0]))(
        kernels.rms_norm(residual, norm, 1e-5)
    )
    kernels.rope_and_store(qkv, angles.cos(), angles.sin(), pool, 0, batch, shape)
    mixed = kernels.attention(qkv, pool, 0, batch, shape)
    x = kernels.add_rms_norm(kernels.multiply(mixed, weight(hidden, 64, seed=4)), residual, norm, 1e-5)
    return kernels.gated_activation(kernels.multiply(x, weight(80, hidden, seed=5)), "silu")


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_layer_equals_the_specification(device: torch.device, deterministic: bool) -> None:
    linear = BATCH_INVARIANT if deterministic else PLAIN
    found = layer(TritonKernels(linear, deterministic=deterministic), device)
    torch.testing.assert_close(found, layer(ReferenceKernels(), device), rtol=1e-4, atol=1e-5)
