"""Attention against its specification in float32, and what a row's result may depend on."""

from dataclasses import replace

import pytest
import torch

from rekindle.engine.kernels.gpu.attention import attention
from rekindle.engine.kernels.interface import AttentionBatch, AttentionShape, KVPool
from rekindle.engine.kernels.reference import ReferenceKernels
from support.paged import attention_batch, kv_pool, qkv_rows

DTYPES = [torch.float32, torch.bfloat16]
RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Of the whole result by its norm. bf16 rounds weights and results to 8 bits: each is off by 2^-9 at most."""

SHAPES = {
    "three groups of three": AttentionShape(9, 3, 64, 64**-0.5),
    "a head size that is no power of two": AttentionShape(2, 2, 80, 80**-0.5),
    "one group of sixteen": AttentionShape(16, 1, 128, 128**-0.5),
    "wide heads, window, soft cap": AttentionShape(4, 2, 256, 1 / 16, window=20, softcap=30.0),
    "a window wider than a split": AttentionShape(5, 1, 32, 0.2, window=150),
    "many kv heads": AttentionShape(8, 8, 16, 0.25),
}
BATCHES = {
    "one token": ([1], [1]),
    "decode": ([1, 1, 1], [5, 64, 281]),
    "whole prompt": ([40], [40]),
    "cached prefixes and single rows": ([1, 17, 2], [140, 90, 2]),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Case:
    """Queries over a pool, to be attended to as a whole or in other cuts."""

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        queries: list[int],
        contexts: list[int],
        device: torch.device,
        page_tokens: int = 16,
    ) -> None:
        self.shape = shape
        self.batch, num_pages = attention_batch(queries, contexts, page_tokens, device)
        self.pool = kv_pool(num_pages, 2, page_tokens, shape, dtype, device)
        self.qkv = qkv_rows(sum(queries), shape, dtype, device)
        _spoil_unused_slots(self.pool, self.batch)

    def attend(self, deterministic: bool = False) -> torch.Tensor:
        return attention(self.qkv, self.pool, 1, self.batch, self.shape, deterministic=deterministic)

    def attend_to_part(self, s: int, first: int, last: int, deterministic: bool = False) -> torch.Tensor:
        """Rows `first .. last` of sequence s as a step of their own."""
        starts, context = self.batch.query_start, self.batch.context[s]
        num_rows = starts[s + 1] - starts[s]
        part = _batch_of([0, last - first], [context - (num_rows - last)], self.batch.pages_SM[s : s + 1])
        qkv = self.qkv[starts[s] + first : starts[s] + last]
        return attention(qkv, self.pool, 1, part, self.shape, deterministic=deterministic)

    def expected(self) -> torch.Tensor:
        pool = KVPool(self.pool.kv_PLBCD.float().nan_to_num())
        return ReferenceKernels().attention(self.qkv.float(), pool, 1, self.batch, self.shape)


def _batch_of(starts: list[int], contexts: list[int], pages_SM: torch.Tensor) -> AttentionBatch:
    return AttentionBatch(
        starts,
        contexts,
        torch.tensor(starts, dtype=torch.int32, device=pages_SM.device),
        torch.tensor(contexts, dtype=torch.int32, device=pages_SM.device),
        pages_SM,
        torch.zeros(starts[-1], dtype=torch.int64, device=pages_SM.device),
    )


def _spoil_unused_slots(pool: KVPool, batch: AttentionBatch) -> None:
    """Memory past a context's end, and pages of nobody, may hold anything."""
    page_tokens = pool.kv_PLBCD.shape[2]
    is_used = torch.zeros(pool.kv_PLBCD.shape[0], page_tokens, dtype=torch.bool)
    for context, pages in zip(batch.context, batch.pages_SM.tolist(), strict=True):
        for position in range(context):
            is_used[pages[position // page_tokens], position % page_tokens] = True
    pool.kv_PLBCD.transpose(1, 2)[~is_used.to(pool.kv_PLBCD.device)] = torch.nan


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN is close to nothing."""
    error = (found.float() - expected).norm() / expected.norm()
    assert error <= RELATIVE_ERROR[found.dtype], f"relative error {error:.2e}"


@dtypes
@shapes
@pytest.mark.parametrize(("queries", "contexts"), BATCHES.values(), ids=BATCHES)
def test_attention_equals_the_specification(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape, queries: list[int], contexts: list[int]
) -> None:
    case = Case(shape, dtype, queries, contexts, device)
    assert_close(case.attend(), case.expected())


def test_deterministic_attention_equals_the_specification(device: torch.device) -> None:
    case = Case(SHAPES["wide heads, window, soft cap"], torch.bfloat16, [1, 33], [40, 120], device)
    assert_close(case.attend(deterministic=True), case.expected())


@pytest.mark.parametrize("page_tokens", [8, 32])
def test_pages_may_have_other_sizes(device: torch.device, page_tokens: int) -> None:
    case = Case(SHAPES["three groups of three"], torch.bfloat16, [1, 33], [290, 90], device, page_tokens)
    assert_close(case.attend(), case.expected())


def test_splits_grow_when_a_context_would_fall_into_too_many(device: torch.device) -> None:
    shape = AttentionShape(1, 1, 16, 0.25)
    case = Case(shape, torch.float32, [1], [64 * 128 + 100], device, page_tokens=32)
    assert_close(case.attend(), case.expected())


def test_more_sequences_than_a_block_of_them_are_all_found(device: torch.device) -> None:
    queries = [0] * 300
    queries[0], queries[255], queries[256], queries[280] = 1, 2, 1, 3
    contexts = [17 * count for count in queries]
    case = Case(AttentionShape(1, 1, 16, 0.25), torch.float32, queries, contexts, device)
    assert_close(case.attend(), case.expected())


def test_sequences_that_pad_a_captured_graph_are_left_out(device: torch.device) -> None:
    case = Case(SHAPES["three groups of three"], torch.float32, [1, 1], [200, 30], device)
    padded = replace(
        case.batch,
        query_start=[],
        context=[],
        query_start_S1=torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32, device=device),
        context_S=torch.tensor([200, 30, 0, 0], dtype=torch.int32, device=device),
        pages_SM=torch.nn.functional.pad(case.batch.pages_SM, (0, 30, 0, 2)),
    )
    rows = torch.nn.functional.pad(case.qkv, (0, 0, 0, 2), value=torch.nan)
    assert torch.equal(attention(rows, case.pool, 1, padded, case.shape)[:2], case.attend())


@dtypes
@shapes
def test_a_single_row_does_not_depend_on_the_batch(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> None:
    case = Case(shape, dtype, [1, 2, 1], [130, 20, 290], device)
    together = case.attend()
    for s, row in ((0, 0), (2, 3)):
        assert torch.equal(case.attend_to_part(s, 0, 1)[0], together[row])


@dtypes
@shapes
def test_a_tiled_row_does_not_depend_on_how_its_context_was_cut(
    device: torch.device, dtype: torch.dtype, shape: AttentionShape
) -> None:
    case = Case(shape, dtype, [36, 2], [140, 40], device)
    together = case.attend()
    for first, last in ((0, 2), (2, 36)):
        assert torch.equal(case.attend_to_part(0, first, last), together[first:last])
    assert torch.equal(case.attend_to_part(1, 0, 2), together[36:])


@shapes
def test_deterministic_rows_do_not_depend_on_being_alone_in_a_step(device: torch.device, shape: AttentionShape) -> None:
    case = Case(shape, torch.bfloat16, [40], [200], device)
    together = case.attend(deterministic=True)
    for row in (0, 17):
        assert torch.equal(case.attend_to_part(0, row, row + 1, deterministic=True)[0], together[row])


def test_a_page_beyond_two_thousand_million_elements_is_found(device: torch.device) -> None:
    """Offsets do not fit 32 bits. The pool is address space that is not written to, but for one page."""
    if device.type != "cpu":
        pytest.skip("memory on a GPU is not reserved lazily")
    shape, page_elements, last_page = AttentionShape(2, 1, 16, 0.25), 2**28, 9
    memory = torch.empty((last_page + 1) * page_elements, dtype=torch.bfloat16)
    far = KVPool(memory.as_strided((last_page + 1, 1, 16, 2, 16), (page_elements, 512, 32, 16, 1)))
    near = kv_pool(1, 1, 16, shape, torch.bfloat16, device)
    far.kv_PLBCD[last_page] = near.kv_PLBCD[0]
    for rows in (1, 3):
        qkv = qkv_rows(rows, shape, torch.bfloat16, device)
        found, expected = (
            attention(qkv, pool, 0, _batch_of([0, rows], [12], torch.tensor([[page]], dtype=torch.int32)), shape)
            for pool, page in ((far, last_page), (near, 0))
        )
        assert torch.equal(found, expected)
