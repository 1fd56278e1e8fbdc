"""Attention at the sizes of real models: decoding and prefill."""

import itertools
from functools import partial

import torch

from rekindle.engine.kernels.gpu.attention import attention
from rekindle.engine.kernels.interface import AttentionShape
from support.paged import attention_batch, kv_pool, qkv_rows

SHAPES = {
    "smollm2-135m": AttentionShape(9, 3, 64, 0.125),
    "head size 80": AttentionShape(32, 32, 80, 0.11),
    "llama-3-8b": AttentionShape(32, 8, 128, 0.088),
    "gemma-2-9b": AttentionShape(16, 8, 256, 0.0625, window=4096, softcap=50.0),
    "gemma-3-1b, global": AttentionShape(4, 1, 256, 0.0625),
}
QUERIES = {"decode": [1, 1], "prefill": [600, 40]}


def attend(shape: AttentionShape, queries: list[int], dtype: torch.dtype) -> None:
    batch, num_pages = attention_batch(queries, [1000, 900], 16)
    pool = kv_pool(num_pages, 2, 16, shape, dtype)
    attention(qkv_rows(sum(queries), shape, dtype), pool, 1, batch, shape)


CASES = [*itertools.product(SHAPES, QUERIES, [torch.bfloat16]), ("llama-3-8b", "prefill", torch.float32)]
LAUNCHES = {
    f"{name}: {kind}, {dtype}": partial(attend, SHAPES[name], QUERIES[kind], dtype) for name, kind, dtype in CASES
}
