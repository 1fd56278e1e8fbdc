"""Rotation and storage against their specification."""

import pytest
import torch

from rekindle.engine.kernels.gpu.rope import rope_and_store
from rekindle.engine.kernels.interface import AttentionShape, KVPool
from rekindle.engine.kernels.reference import ReferenceKernels
from support.paged import attention_batch, kv_pool, qkv_rows, random

SHAPES = [
    AttentionShape(9, 3, 64, 0.125),
    AttentionShape(2, 2, 80, 0.1),
    AttentionShape(20, 1, 128, 0.1),
    AttentionShape(1, 1, 256, 0.1),
    AttentionShape(6, 2, 16, 0.25),
]
ids = pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"{shape.num_heads}h{shape.num_kv_heads}kv{shape.head_dim}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_tokens", [8, 16, 32])
@ids
def test_rotation_and_storage_equal_the_specification(
    device: torch.device, shape: AttentionShape, page_tokens: int, dtype: torch.dtype
) -> None:
    batch, num_pages = attention_batch([3, 1, 5], [40, 7, 5], page_tokens, device)
    qkv = qkv_rows(9, shape, dtype, device)
    angles = random(9, shape.head_dim // 2, dtype=torch.float32, seed=6).to(device)
    before = kv_pool(num_pages, 2, page_tokens, shape, dtype, device)
    ours, theirs = (kv_pool(num_pages, 2, page_tokens, shape, dtype, device) for _ in range(2))
    our_qkv, their_qkv = qkv.clone(), qkv.clone()
    rope_and_store(our_qkv, angles.cos(), angles.sin(), ours, 1, batch, shape)
    ReferenceKernels().rope_and_store(their_qkv, angles.cos(), angles.sin(), theirs, 1, batch, shape)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(our_qkv, their_qkv, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.kv_PLBCD, theirs.kv_PLBCD, rtol=tolerance, atol=tolerance)
    assert torch.equal(ours.kv_PLBCD[:, 0], before.kv_PLBCD[:, 0])


def test_a_row_with_a_negative_slot_is_stored_nowhere(device: torch.device) -> None:
    shape = SHAPES[0]
    batch, num_pages = attention_batch([2], [2], 16, device)
    batch.slots_T.fill_(-1)
    pool, before = (kv_pool(num_pages, 1, 16, shape, torch.float32, device) for _ in range(2))
    angles = torch.zeros(2, shape.head_dim // 2, device=device)
    rope_and_store(qkv_rows(2, shape, torch.float32, device), angles, angles, pool, 0, batch, shape)
    assert torch.equal(pool.kv_PLBCD, before.kv_PLBCD)


def test_a_page_beyond_two_thousand_million_elements_is_found(device: torch.device) -> None:
    """Offsets do not fit 32 bits. The pool is address space that is not written to, but for one page."""
    if device.type != "cpu":
        pytest.skip("memory on a GPU is not reserved lazily")
    shape = AttentionShape(2, 1, 16, 0.25)
    page_elements, last_page = 2**28, 9
    memory = torch.empty((last_page + 1) * page_elements, dtype=torch.bfloat16)
    pool = KVPool(memory.as_strided((last_page + 1, 1, 16, 2, 16), (page_elements, 512, 32, 16, 1)))
    batch, _ = attention_batch([1], [1], 16, device)
    batch.slots_T.fill_(last_page * 16 + 3)
    qkv = qkv_rows(1, shape, torch.bfloat16, device)
    rope_and_store(qkv, torch.ones(1, 8), torch.zeros(1, 8), pool, 0, batch, shape)
    assert torch.equal(pool.kv_PLBCD[last_page, 0, 3].flatten(), qkv[0, 32:])
