"""Rotation and storage at the sizes of real models."""

import torch

from rekindle.engine.kernels.gpu.rope import rope_and_store
from rekindle.engine.kernels.interface import AttentionShape
from support.paged import attention_batch, kv_pool, qkv_rows

SHAPES = [AttentionShape(9, 3, 64, 0.125), AttentionShape(32, 8, 128, 0.09), AttentionShape(8, 4, 256, 0.0625)]


def rotate(shape: AttentionShape) -> None:
    batch, num_pages = attention_batch([1] * 4, [40] * 4, 16)
    pool = kv_pool(num_pages, 2, 16, shape, torch.bfloat16)
    angles = torch.zeros(4, shape.head_dim // 2)
    rope_and_store(qkv_rows(4, shape, torch.bfloat16), angles, angles, pool, 1, batch, shape)


LAUNCHES = {f"{shape.num_heads} heads of {shape.head_dim}": lambda shape=shape: rotate(shape) for shape in SHAPES}
