"""Attention at the sizes of real models: decoding and prefill."""

import itertools

import torch

from rekindle.engine.kernels.gpu.attention import attention
from rekindle.engine.kernels.interface import AttentionShape
from support.paged import attention_batch, kv_pool, qkv_rows

SHAPES = {
    "smollm2-135m": AttentionShape(9, 3, 64, 0.125),
    "head size 80": AttentionShape(32, 32, 80, 0.11),
    "llama-3-8b": AttentionShape(32, 8, 128, 0.088),
    "qwen3 with 16 heads to a group": AttentionShape(64, 4, 128, 0.088),
    "mistral-7b with its window": AttentionShape(32, 8, 128, 0.088, window=4096),
    "gemma-2-9b": AttentionShape(16, 8, 256, 0.0625, window=4096, softcap=50.0),
    "gemma-3-1b, global": AttentionShape(4, 1, 256, 0.0625),
}
QUERIES = {"decode": [1, 1], "prefill": [600, 40]}


def attend(shape: AttentionShape, queries: list[int]) -> None:
    batch, num_pages = attention_batch(queries, [1000, 900], 16)
    pool = kv_pool(num_pages, 2, 16, shape, torch.bfloat16)
    attention(qkv_rows(sum(queries), shape, torch.bfloat16), pool, 1, batch, shape)


LAUNCHES = {
    f"{name}: {kind}": lambda shape=SHAPES[name], queries=QUERIES[kind]: attend(shape, queries)
    for name, kind in itertools.product(SHAPES, QUERIES)
}
