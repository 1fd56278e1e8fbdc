"""Random queries over a page pool, for tests of attention."""

import torch

from rekindle.engine.kernels.interface import AttentionBatch, AttentionShape, KVPool


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_batch(
    queries: list[int], contexts: list[int], page_tokens: int, device: torch.device | str = "cpu", spare_pages: int = 3
) -> tuple[AttentionBatch, int]:
    """Sequences with the given numbers of query rows and lengths of context, their pages in no order among those of a
    pool; and how many pages that pool has."""
    needed = [-(-context // page_tokens) for context in contexts]
    num_pages = sum(needed) + spare_pages
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3)).tolist()
    pages, slots, starts = [], [], [0]
    for count, context, own in zip(queries, contexts, needed, strict=True):
        mine, order = order[:own], order[own:]
        pages.append(mine + [0] * (max(needed) - own))
        slots += [mine[p // page_tokens] * page_tokens + p % page_tokens for p in range(context - count, context)]
        starts.append(starts[-1] + count)
    batch = AttentionBatch(
        starts,
        contexts,
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        torch.tensor(pages, dtype=torch.int32, device=device),
        torch.tensor(slots, device=device),
    )
    return batch, num_pages


def kv_pool(
    num_pages: int,
    num_layers: int,
    page_tokens: int,
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    slack: int = 64,
) -> KVPool:
    """A pool of random keys and values whose pages are longer than their tokens need by `slack` NaN elements."""
    sizes = (num_pages, num_layers, page_tokens, 2 * shape.num_kv_heads, shape.head_dim)
    token = sizes[3] * sizes[4]
    page = num_layers * page_tokens * token
    memory = torch.full((num_pages, page + slack), torch.nan, dtype=dtype)
    memory[:, :page] = random(num_pages, page, dtype=dtype, seed=4)
    strides = (page + slack, page_tokens * token, token, shape.head_dim, 1)
    return KVPool(memory.to(device).as_strided(sizes, strides))


def qkv_rows(
    num_rows: int, shape: AttentionShape, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return random(num_rows, width, dtype=dtype, seed=5).to(device)
