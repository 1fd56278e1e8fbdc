"""Grouped low-rank updates against their specification, and that a row's bits are its own."""

import random
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.engine.kernels.gpu.lora_plan import LoraPlan, make_plan
from rekindle.engine.kernels.interface import AdapterMatrices, LoraBatch, LoraGroup, make_lora_batch
from rekindle.engine.kernels.reference import ReferenceKernels
from rekindle.errors import InternalError
from support.adapter_pages import BoundLora, Segment, paged_lora

DTYPES = [torch.float32, torch.bfloat16]
REFERENCE = ReferenceKernels()
LAYER = 1
GQA = (256, (256, 64, 64))
"""Input features and slices of a small qkv projection."""


def inputs(
    batch: LoraBatch, sizes: tuple[int, tuple[int, ...]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    assert batch.pool_PX is not None
    generator = torch.Generator().manual_seed(5)
    num_rows, device = batch.row_start[-1], batch.pool_PX.device
    x_TK = torch.randn(num_rows, sizes[0], generator=generator).to(device, dtype)
    return x_TK, torch.randn(num_rows, sum(sizes[1]), generator=generator).to(device, dtype)


def expected(x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, group: LoraGroup) -> torch.Tensor:
    """The specification in float64, on the CPU, not rounded to the compute dtype."""
    assert batch.pool_PX is not None
    exact_TN = y_TN.cpu().double()
    moved = [
        None if it is None else AdapterMatrices(it.table_LPF.cpu(), it.max_rank, pages_M=it.pages_M.cpu())
        for it in batch.adapters
    ]
    pool_PX = batch.pool_PX.cpu().double()
    REFERENCE.lora(x_TK.cpu().double(), exact_TN, make_lora_batch(batch.row_start, moved, pool_PX), LAYER, group)
    return exact_TN


def close(found_TN: torch.Tensor, exact_TN: torch.Tensor, in_features: int) -> None:
    """Sums of K and rank products in float32, then one rounding to the compute dtype (half a unit in the last place).

    Rounding errors of a sum of K terms of like size grow as sqrt(K); updates are of the size of 1."""
    eps = torch.finfo(torch.float32).eps
    unit = 0 if found_TN.dtype == torch.float32 else torch.finfo(found_TN.dtype).eps / 2
    torch.testing.assert_close(found_TN.cpu().double(), exact_TN, rtol=unit + 8 * eps, atol=8 * eps * in_features**0.5)


def check(
    segments: list[Segment],
    sizes: tuple[int, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    lora: BoundLora | None = None,
    page_elements: int = 320,
) -> None:
    batch, group = paged_lora(
        segments, *sizes, dtype=dtype, device=device, base_rows=3, first=2, page_elements=page_elements
    )
    x_TK, y_TN = inputs(batch, sizes, dtype)
    exact_TN, untouched = expected(x_TK, y_TN, batch, group), y_TN.clone()
    (lora or BoundLora()).lora(x_TK, y_TN, batch, LAYER, group)
    close(y_TN, exact_TN, sizes[0])
    base = torch.ones(len(y_TN), dtype=torch.bool)
    for g, adapter in enumerate(batch.adapters):
        if adapter is not None:
            base[batch.row_start[g] : batch.row_start[g + 1]] = False
    assert torch.equal(y_TN[base], untouched[base])


MIXED = [
    Segment(1, (8, 3, 1)),
    Segment(2, None),
    Segment(4, (16, 0, 5)),
    Segment(0, (8, 8, 8)),
    Segment(7, (40, 1, 3)),
    Segment(19, (9, 20, 0)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lora", [BoundLora(), BoundLora(max_rank=64), BoundLora(deterministic=True)])
def test_mixed_segments_equal_the_specification(dtype: torch.dtype, lora: BoundLora, device: torch.device) -> None:
    check(MIXED, GQA, dtype, device, lora)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("rank", [1, 3, 8, 64, 256])
def test_every_rank_equals_the_specification(dtype: torch.dtype, rank: int, rows: int, device: torch.device) -> None:
    check([Segment(rows, (rank,))], (64, (128,)), dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_that_are_no_multiples_of_a_run_equal_the_specification(dtype: torch.dtype, device: torch.device) -> None:
    segments = [Segment(1, (8,)), Segment(9, (5,)), Segment(80, (17,))]
    check(segments, (100, (77,)), dtype, device)
    check(segments[:2], (128, (77,)), dtype, device)
    check(segments[:2], (100, (64,)), dtype, device)


def test_prefill_rows_and_decode_rows_share_a_launch(device: torch.device) -> None:
    segments = [Segment(1, (8, 0, 8)), Segment(150, (33, 8, 8)), Segment(1, (64, 1, 8)), Segment(67, None)]
    check(segments, GQA, torch.bfloat16, device)


@pytest.mark.parametrize("lora", [BoundLora(), BoundLora(deterministic=True)], ids=["free", "deterministic"])
def test_sums_over_k_are_split_and_joined(lora: BoundLora, device: torch.device) -> None:
    check([Segment(1, (8,)), Segment(6, (3,))], (4160, (64,)), torch.bfloat16, device, lora)


def test_an_output_of_many_columns_equals_the_specification(device: torch.device) -> None:
    check([Segment(1, (5,)), Segment(2, (8,))], (64, (5056,)), torch.bfloat16, device)


def test_33_segments_equal_the_specification(device: torch.device) -> None:
    ranks = random.Random(1)
    check([Segment(1, (ranks.randint(0, 24),)) for _ in range(33)], (128, (64,)), torch.bfloat16, device)


def test_segments_beyond_one_step_of_the_search_are_found(device: torch.device) -> None:
    segments = [Segment(0, None)] * 200 + [Segment(40, None), Segment(40, (4,)), Segment(1, (4,))]
    check(segments, (64, (64,)), torch.float32, device, BoundLora(max_rank=4))


@pytest.mark.parametrize("page_elements", [64, 192, 4096])
def test_pages_of_any_size_hold_matrices(page_elements: int, device: torch.device) -> None:
    check([Segment(2, (8,)), Segment(5, (3,))], (192, (128,)), torch.bfloat16, device, page_elements=page_elements)
    check([Segment(2, (8,)), Segment(5, (3,))], (90, (70,)), torch.bfloat16, device, page_elements=page_elements)


def test_pages_beyond_the_reach_of_32_bits_are_read(device: torch.device) -> None:
    sizes = (64, (64,))
    batch, group = paged_lora([Segment(2, (8,)), Segment(6, (8,))], *sizes, dtype=torch.bfloat16, device=device)
    assert batch.pool_PX is not None
    num_pages, page_elements = batch.pool_PX.shape
    highest = max(int(it.pages_M.max()) for it in batch.adapters)
    stride = 2**31 // highest // 64 * 64 + 64
    far_PX = torch.empty(stride * num_pages, dtype=torch.bfloat16, device=device)  # memory that is not touched is free
    far_PX = far_PX.as_strided((num_pages, page_elements), (stride, 1)).copy_(batch.pool_PX)
    x_TK, y_TN = inputs(batch, sizes, torch.bfloat16)
    exact_TN = expected(x_TK, y_TN, batch, group)
    BoundLora().lora(x_TK, y_TN, replace(batch, pool_PX=far_PX), LAYER, group)
    close(y_TN, exact_TN, 64)


@pytest.mark.parametrize("segments", [[], [Segment(4, None)], [Segment(0, (8,))], [Segment(3, (0,))]])
def test_a_batch_without_updates_changes_nothing(segments: list[Segment], device: torch.device) -> None:
    check(segments, (64, (64,)), torch.float32, device)
    check(segments, (64, (64,)), torch.float32, device, BoundLora(max_rank=8))


def test_strided_rows_and_columns_of_a_wider_output_are_updated_in_place(device: torch.device) -> None:
    batch, group = paged_lora([Segment(3, (8,))], 64, (64,), dtype=torch.float32, device=device)
    x_TK, y_TN = inputs(batch, (128, (256,)), torch.float32)
    group = replace(group, out_offsets=(128,))
    exact_TN = expected(x_TK[:, 64:], y_TN, batch, group)
    BoundLora().lora(x_TK[:, 64:], y_TN, batch, LAYER, group)
    close(y_TN, exact_TN, 64)


def run_alone(
    lora: BoundLora, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, group: LoraGroup, row: int
) -> torch.Tensor:
    g = next(g for g in range(len(batch.adapters)) if batch.row_start[g] <= row < batch.row_start[g + 1])
    one, y_1N = make_lora_batch([0, 1], [batch.adapters[g]], batch.pool_PX), y_TN[row : row + 1].clone()
    lora.lora(x_TK[row : row + 1], y_1N, one, LAYER, group)
    return y_1N[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_deterministic_row_does_not_depend_on_its_batch(dtype: torch.dtype, device: torch.device) -> None:
    sizes = (1088, (64, 64))
    segments = [Segment(1, (8, 3)), Segment(18, (20, 9)), Segment(2, None), Segment(3, (8, 0))]
    batch, group = paged_lora(segments, *sizes, dtype=dtype, device=device)
    x_TK, y_TN = inputs(batch, sizes, dtype)
    together_TN = y_TN.clone()
    BoundLora(deterministic=True).lora(x_TK, together_TN, batch, LAYER, group)
    for row, max_rank in ((0, None), (1, 64), (18, None), (23, 64)):
        lora = BoundLora(max_rank, deterministic=True)
        assert torch.equal(run_alone(lora, x_TK, y_TN, batch, group, row), together_TN[row])


def test_other_rows_of_the_same_sizes_do_not_change_a_row(device: torch.device) -> None:
    """Without `deterministic` too: only sizes choose how sums are cut, never values or other adapters."""
    sizes = (256, (128,))
    segments = [Segment(1, (8,)), Segment(3, (20,)), Segment(9, (5,)), Segment(70, (16,))]
    batch, group = paged_lora(segments, *sizes, dtype=torch.bfloat16, device=device)
    x_TK, y_TN = inputs(batch, sizes, torch.bfloat16)
    found_TN, other_TN = y_TN.clone(), y_TN.clone()
    BoundLora().lora(x_TK, found_TN, batch, LAYER, group)
    kept = [0, 2, 6, 40]
    others = torch.full_like(x_TK, torch.nan)
    others[kept] = x_TK[kept]
    BoundLora().lora(others, other_TN, batch, LAYER, group)
    assert torch.equal(other_TN[kept], found_TN[kept])
    again_TN = y_TN.clone()
    BoundLora().lora(x_TK, again_TN, batch, LAYER, group)
    assert torch.equal(again_TN, found_TN)


def test_launches_of_a_captured_size_follow_rewritten_tensors(device: torch.device) -> None:
    """What a replayed graph does: nothing but the memory of its arguments may change."""
    capacity = 6
    batch, group = paged_lora(MIXED, *GQA, dtype=torch.bfloat16, device=device)
    x_TK, y_TN = inputs(batch, GQA, torch.bfloat16)
    used = [4, 0, 2]
    again = make_lora_batch([1, 2, 4, 30], [batch.adapters[g] for g in used], batch.pool_PX)
    fixed = LoraBatch(
        [],
        torch.full((capacity + 1,), 30, dtype=torch.int32, device=device),
        (),
        torch.zeros(capacity, dtype=torch.int64, device=device),
        torch.zeros(capacity, dtype=torch.int64, device=device),
        48,
        batch.pool_PX,
    )
    fixed.row_start_G1[:4] = again.row_start_G1
    fixed.tables_G[:3] = again.tables_G
    fixed.places_G[:3] = again.places_G
    exact_TN = expected(x_TK[:30], y_TN[:30], again, group)
    y_TN = y_TN[:30].clone()
    BoundLora().lora(x_TK[:30], y_TN, fixed, LAYER, group)
    close(y_TN, exact_TN, GQA[0])


def test_a_rank_beyond_the_captured_bound_is_plain_to_see(device: torch.device) -> None:
    batch, group = paged_lora([Segment(2, (40,)), Segment(6, (8,))], 64, (64,), dtype=torch.float32, device=device)
    x_TK, y_TN = inputs(batch, (64, (64,)), torch.float32)
    exact_TN = expected(x_TK, y_TN, batch, group)
    BoundLora(max_rank=32).lora(x_TK, y_TN, batch, LAYER, group)
    assert y_TN[:2].isnan().all()
    close(y_TN[2:], exact_TN[2:], 64)


def test_a_scale_is_read_as_the_double_it_is(device: torch.device) -> None:
    batch, group = paged_lora([Segment(1, (8,))], 64, (64,), dtype=torch.float32, device=device)
    assert batch.adapters[0] is not None
    (bits,) = struct.unpack("q", struct.pack("d", -3.75))
    batch.adapters[0].table_LPF[LAYER, 0, 3] = bits
    x_TK, y_TN = inputs(batch, (64, (64,)), torch.float32)
    exact_TN = expected(x_TK, y_TN, batch, group)
    BoundLora().lora(x_TK, y_TN, batch, LAYER, group)
    close(y_TN, exact_TN, 64)


def test_a_batch_without_a_pool_is_refused() -> None:
    batch = replace(
        paged_lora([Segment(1, (8,))], 64, (64,), dtype=torch.float32, device=torch.device("cpu"))[0], pool_PX=None
    )
    x_TK = torch.zeros(1, 64)
    with pytest.raises(InternalError, match="no page pool"):
        BoundLora().lora(x_TK, x_TK, batch, LAYER, LoraGroup(0, (0,), (64,)))


@settings(max_examples=8)
@given(
    segments=st.lists(
        st.builds(Segment, st.integers(0, 40), st.none() | st.tuples(st.integers(0, 20), st.integers(0, 20))),
        max_size=5,
    ),
    in_features=st.sampled_from([64, 72, 192]),
    sizes=st.sampled_from([(64, 64), (128, 40)]),
    max_rank=st.sampled_from([None, 24]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_segmentation_equals_the_specification(
    segments: list[Segment],
    in_features: int,
    sizes: tuple[int, ...],
    max_rank: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    check(segments, (in_features, sizes), dtype, device, BoundLora(max_rank))


def plan_of(
    rows: list[int], max_rank: int, in_features: int, fitted: bool, deterministic: bool = False
) -> LoraPlan | None:
    return make_plan(
        num_rows=sum(rows),
        num_segments=len(rows),
        segment_rows=tuple(rows) if fitted else None,
        max_rank=max_rank,
        in_features=in_features,
        out_sizes=(64, 64),
        dtype=torch.bfloat16,
        num_sms=132,
        deterministic=deterministic,
    )


BATCHES = st.lists(st.integers(0, 300), min_size=1, max_size=80).filter(any)


@given(rows=BATCHES, max_rank=st.integers(1, 300), in_features=st.integers(1, 20000), deterministic=st.booleans())
def test_plans_cover_every_tile_and_every_input_feature(
    rows: list[int], max_rank: int, in_features: int, deterministic: bool
) -> None:
    for fitted in (False, True):
        plan = plan_of(rows, max_rank, in_features, fitted, deterministic)
        assert plan is not None
        assert plan.num_tiles >= len(rows) + sum(max(-(-count // plan.tile_rows) - 1, 0) for count in rows)
        assert plan.max_rank >= max_rank and plan.max_rank % 16 == 0
        assert plan.chunk * (plan.splits - 1) < in_features <= plan.chunk * plan.splits
        assert plan.chunk % plan.vector_step == 0


@given(rows=BATCHES, max_rank=st.integers(1, 300), in_features=st.integers(1, 20000), fitted=st.booleans())
def test_deterministic_plans_cut_sums_alike_for_every_batch(
    rows: list[int], max_rank: int, in_features: int, fitted: bool
) -> None:
    alone, together = plan_of([1], 1, in_features, True, True), plan_of(rows, max_rank, in_features, fitted, True)
    for name in ("tile_rows", "vector_rows", "chunk", "splits", "dot_ranks", "expand_dot_ranks", "dot_columns"):
        assert getattr(alone, name) == getattr(together, name)


def test_plans_of_nothing_are_none() -> None:
    assert plan_of([0, 0], 8, 64, fitted=True) is None
    assert plan_of([3], 0, 64, fitted=True) is None
    assert plan_of([0], 8, 64, fitted=False) is None
