"""The native kernels against their specification, for every instruction set of this CPU, and their batch invariance."""

import struct
from dataclasses import replace

import pytest
import torch

from rekindle.engine.kernels.interface import (
    LORA_FIELDS,
    PROJECTIONS,
    AdapterMatrices,
    AttentionBatch,
    AttentionShape,
    Kernels,
    KVPool,
    LoraBatch,
    LoraGroup,
    TensorRows,
    make_lora_batch,
)
from rekindle.engine.kernels.linear import FAST
from rekindle.engine.kernels.native_kernels import NativeKernels, supported_libraries
from rekindle.engine.kernels.reference import ReferenceKernels
from support.paged import attention_batch, kv_pool, qkv_rows, random

LIBRARIES = supported_libraries()
REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 2e-2)}

if not LIBRARIES:
    pytest.skip("no native kernels were built here", allow_module_level=True)


@pytest.fixture(params=LIBRARIES, ids=lambda library: library.variant)
def kernels(request: pytest.FixtureRequest) -> NativeKernels:
    return NativeKernels(request.param, FAST)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    relative, absolute = TOLERANCE[found.dtype]
    torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (3, 64), (5, 577), (40, 4096)])
def test_norms_equal_the_specification(kernels: NativeKernels, dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = random(rows, size, dtype=dtype), random(size, dtype=torch.float32, seed=1)
    residual = random(rows, size, dtype=torch.float32, seed=2)
    close(kernels.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    close(kernels.rms_norm(residual, weight, 1e-5, dtype), REFERENCE.rms_norm(residual, weight, 1e-5, dtype))
    ours, theirs = residual.clone(), residual.clone()
    close(kernels.add_rms_norm(x, ours, weight, 1e-5), REFERENCE.add_rms_norm(x, theirs, weight, 1e-5))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_read_strided_heads(kernels: NativeKernels, dtype: torch.dtype) -> None:
    heads = random(6, 9 * 24, dtype=dtype).view(6, 9, 24)[:, 2:7]
    weight = random(24, dtype=torch.float32, seed=1)
    close(kernels.rms_norm(heads, weight, 1e-6), REFERENCE.rms_norm(heads, weight, 1e-6))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 8), (7, 100), (33, 1536)])
def test_gated_activation_equals_the_specification(
    kernels: NativeKernels, dtype: torch.dtype, rows: int, size: int, activation: str
) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype) * 4
    close(kernels.gated_activation(gate_up, activation), REFERENCE.gated_activation(gate_up, activation))


def lora_case(
    dtype: torch.dtype, ranks: list[int], rows: list[int], in_features: int, sizes: tuple[int, ...], first: int = 0
) -> tuple[LoraBatch, LoraGroup]:
    """Segments with the given ranks (0: the adapter does not touch the projection) after three base rows."""
    adapters: list[AdapterMatrices | None] = []
    for g, rank in enumerate(ranks):
        table = torch.zeros(2, len(PROJECTIONS), LORA_FIELDS, dtype=torch.int64)
        pieces = [torch.full((64,), torch.nan, dtype=dtype)]
        for i, size in enumerate(sizes):
            if (g + i) % 5 == 4:
                continue
            a, b = random(rank, in_features, dtype=dtype, seed=g), random(rank, size, dtype=dtype, seed=g + 50) * 0.1
            (bits,) = struct.unpack("q", struct.pack("d", 0.5 + g))
            begin = sum(len(piece) for piece in pieces)
            table[1, first + i] = torch.tensor([begin, begin + a.numel(), rank, bits])
            pieces += [a.flatten(), b.flatten()]
        adapters.append(AdapterMatrices(table, rank, vector=torch.cat(pieces)) if rank else None)
    starts = [3]
    for count in rows:
        starts.append(starts[-1] + count)
    offsets = tuple(sum(sizes[:i]) for i in range(len(sizes)))
    return make_lora_batch(starts, adapters), LoraGroup(first, offsets, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("ranks", "rows"),
    [
        ([8], [1]),
        ([1], [5]),
        ([3, 64, 0, 16, 256], [1, 2, 4, 0, 3]),
        ([8, 16, 32, 64] * 8, [1] * 32),
        ([63, 11, 9, 7, 5, 3, 2, 1] * 4, [6, 1, 1, 3, 1, 2, 1, 1] * 4),
        ([16], [130]),
        ([64, 5], [70, 33]),
    ],
)
@pytest.mark.parametrize(("in_features", "sizes"), [(64, (64, 16, 16)), (100, (77,)), (576, (1536, 1536))])
def test_lora_equals_the_specification(
    kernels: NativeKernels,
    dtype: torch.dtype,
    ranks: list[int],
    rows: list[int],
    in_features: int,
    sizes: tuple[int, ...],
) -> None:
    batch, group = lora_case(dtype, ranks, rows, in_features, sizes, first=2)
    x = random(batch.row_start[-1], in_features, dtype=dtype, seed=7) * 0.2
    base = random(batch.row_start[-1], sum(sizes), dtype=dtype, seed=8)
    ours, theirs = base.clone(), base.clone()
    kernels.lora(x, ours, batch, 1, group)
    REFERENCE.lora(x, theirs, batch, 1, group)
    close(ours, theirs)
    assert torch.equal(ours[:3], base[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("ranks", "rows", "in_features", "sizes"),
    [
        ([5, 16], [3000, 1], 72, (104, 40)),
        ([3, 8], [1, 7], 40, (50_003,)),
        ([6] * 9, [7] * 9, 33, (6001, 1)),
    ],
)
def test_lora_serves_thousands_of_rows_and_outputs(
    kernels: NativeKernels,
    dtype: torch.dtype,
    ranks: list[int],
    rows: list[int],
    in_features: int,
    sizes: tuple[int, ...],
) -> None:
    test_lora_equals_the_specification(kernels, dtype, ranks, rows, in_features, sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("ranks", "rows", "sizes"),
    [
        ([8, 32, 3, 64], [40, 1, 7, 2], (96, 32, 32)),
        ([13], [9], (100, 36)),
        ([64], [1], (96,)),
        ([8, 24], [2, 13], (6007,)),
        ([7, 16] * 10, [1] * 20, (77,)),
    ],
)
def test_a_lora_row_does_not_depend_on_the_batch_or_the_threads(
    kernels: NativeKernels, dtype: torch.dtype, ranks: list[int], rows: list[int], sizes: tuple[int, ...]
) -> None:
    batch, group = lora_case(dtype, ranks, rows, 100, sizes)
    x = random(batch.row_start[-1], 100, dtype=dtype, seed=7)
    base = random(batch.row_start[-1], sum(sizes), dtype=dtype, seed=8)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(base.clone())
            kernels.lora(x, results[-1], batch, 1, group)
        torch.set_num_threads(1)
        for g, count in enumerate(rows):
            for row in range(batch.row_start[g], batch.row_start[g] + count):
                one = make_lora_batch([0, 1], [batch.adapters[g]])
                alone = base[row : row + 1].clone()
                kernels.lora(x[row : row + 1], alone, one, 1, group)
                assert all(torch.equal(alone[0], together[row]) for together in results)
    finally:
        torch.set_num_threads(threads)


def attention_case(
    dtype: torch.dtype, shape: AttentionShape, queries: list[int], contexts: list[int], page_tokens: int = 16
) -> tuple[torch.Tensor, KVPool, AttentionBatch]:
    """Random queries over a pool of random keys and values, with pages in no order."""
    batch, num_pages = attention_batch(queries, contexts, page_tokens)
    pool = kv_pool(num_pages, 2, page_tokens, shape, dtype)
    return qkv_rows(batch.query_start[-1], shape, dtype), pool, batch


SHAPES = [
    AttentionShape(9, 3, 64, 64**-0.5),
    AttentionShape(2, 2, 80, 80**-0.5),
    AttentionShape(8, 1, 128, 128**-0.5),
    AttentionShape(4, 2, 256, 1 / 16, window=20, softcap=30.0),
    AttentionShape(6, 2, 16, 0.25, window=7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_heads}h{shape.num_kv_heads}kv{shape.head_dim}")
@pytest.mark.parametrize(
    ("queries", "contexts"),
    [([1], [1]), ([1], [200]), ([1, 1, 1], [5, 64, 333]), ([70], [70]), ([1, 33, 2, 1], [17, 120, 2, 64])],
)
def test_attention_equals_the_specification(
    kernels: NativeKernels, dtype: torch.dtype, shape: AttentionShape, queries: list[int], contexts: list[int]
) -> None:
    qkv, pool, batch = attention_case(dtype, shape, queries, contexts)
    close(kernels.attention(qkv, pool, 1, batch, shape), REFERENCE.attention(qkv, pool, 1, batch, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_heads}h{shape.num_kv_heads}kv{shape.head_dim}")
def test_an_attention_row_does_not_depend_on_how_its_context_was_split(
    kernels: NativeKernels, dtype: torch.dtype, shape: AttentionShape
) -> None:
    qkv, pool, batch = attention_case(dtype, shape, [90, 1, 40], [150, 77, 40])
    together = kernels.attention(qkv, pool, 0, batch, shape)
    for s in range(3):
        for row in range(batch.query_start[s], batch.query_start[s + 1]):
            context = batch.context[s] - (batch.query_start[s + 1] - 1 - row)
            one = replace(
                batch,
                query_start=[0, 1],
                context=[context],
                query_start_S1=torch.tensor([0, 1], dtype=torch.int32),
                context_S=torch.tensor([context], dtype=torch.int32),
                pages_SM=batch.pages_SM[s : s + 1],
                slots_T=batch.slots_T[row : row + 1],
            )
            assert torch.equal(kernels.attention(qkv[row : row + 1], pool, 0, one, shape)[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.num_heads}h{shape.num_kv_heads}kv{shape.head_dim}")
def test_rotation_and_storage_equal_the_specification(
    kernels: NativeKernels, dtype: torch.dtype, shape: AttentionShape
) -> None:
    qkv, pool, batch = attention_case(dtype, shape, [3, 1, 20], [40, 7, 20])
    angles = random(len(qkv), shape.head_dim // 2, dtype=torch.float32, seed=6)
    results = []
    implementations: tuple[Kernels, ...] = (kernels, REFERENCE)
    for implementation in implementations:
        own_qkv, own_pool = qkv.clone(), KVPool(pool.kv_PLBCD.clone())
        implementation.rope_and_store(own_qkv, angles.cos(), angles.sin(), own_pool, 1, batch, shape)
        results.append((own_qkv, own_pool.kv_PLBCD))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    assert torch.equal(results[0][1][:, 0], pool.kv_PLBCD[:, 0])


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (77, 100), (960, 576), (1000, 1537)])
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 33, 130])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_layers_equal_the_specification(
    kernels: NativeKernels, outputs: int, inputs: int, rows: int, has_bias: bool
) -> None:
    weight = random(outputs, inputs, dtype=torch.bfloat16) / inputs**0.5
    bias = random(outputs, dtype=torch.bfloat16, seed=1) if has_bias else None
    x = random(rows, inputs, dtype=torch.bfloat16, seed=2)
    expected = x.float() @ weight.float().T + (0 if bias is None else bias.float())
    close(kernels.pack_linear(TensorRows(weight), None if bias is None else TensorRows(bias))(x), expected.bfloat16())


def test_a_linear_row_does_not_depend_on_the_batch(kernels: NativeKernels) -> None:
    if not kernels.library.has_linear:
        pytest.skip("this instruction set leaves linear layers to oneDNN")
    linear = kernels.pack_linear(TensorRows(random(200, 300, dtype=torch.bfloat16)), None)
    x = random(150, 300, dtype=torch.bfloat16, seed=1)
    together = linear(x)
    for rows in (1, 2, 5, 16, 31, 64):
        assert torch.equal(linear(x[:rows]), together[:rows])
