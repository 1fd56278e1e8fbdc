"""Paged attention on a GPU, against torch's own attention over contiguous keys and values and against the floor.

    PYTHONPATH=src python benchmarks/gpu/attention.py [--json FILE]

Shapes of an 8B Llama: 32 query heads, 8 key-value heads of 128, pages of 16 tokens in random order. The floor of a
decode step is reading keys and values once at the rate of a device-to-device copy; that of a prefill is its
multiplications at the rate of a large matrix product. Torch has neither pages nor sequences of several lengths, so its
column is for sequences of one length and leaves the gathering out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from rekindle.engine.kernels.interface import AttentionBatch, AttentionShape, KVPool

SHAPE = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, scale=128**-0.5)
PAGE_TOKENS = 16
_CALLS = 10
_REPETITIONS = 30
CASES = (
    ("decode", 1, 1, 1024),
    ("decode", 1, 1, 16_384),
    ("decode", 8, 1, 4096),
    ("decode", 64, 1, 2048),
    ("decode", 256, 1, 1024),
    ("prefill", 1, 2048, 2048),
    ("prefill", 4, 512, 4096),
    ("prefill", 16, 128, 1024),
)
"""(kind, sequences, query rows of each, context of each)"""


@dataclass(frozen=True)
class Figures:
    """One line of the result, times in milliseconds."""

    kind: str
    num_sequences: int
    num_queries: int
    context: int
    ours_ms: float
    torch_ms: float
    floor_ms: float


class Case:
    """Random queries over a pool of random keys and values, and the same laid out for torch."""

    def __init__(self, num_sequences: int, num_queries: int, context: int, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        pages_each = -(-context // PAGE_TOKENS)
        num_pages = num_sequences * pages_each
        width = 2 * SHAPE.num_kv_heads

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=draw, device=device, dtype=torch.bfloat16)

        self.pool = KVPool(random(num_pages, 1, PAGE_TOKENS, width, SHAPE.head_dim))
        order = torch.randperm(num_pages, generator=draw, device=device).int()
        pages_SM = order.view(num_sequences, pages_each)
        num_rows = num_sequences * num_queries
        self.qkv_TE = random(num_rows, (SHAPE.num_heads + width) * SHAPE.head_dim)
        starts = list(range(0, num_rows + 1, num_queries))
        positions_T = torch.arange(context - num_queries, context, device=device).repeat(num_sequences)
        sequence_T = torch.arange(num_sequences, device=device).repeat_interleave(num_queries)
        page_T = pages_SM[sequence_T, positions_T // PAGE_TOKENS].long()
        self.batch = AttentionBatch(
            query_start=starts,
            context=[context] * num_sequences,
            query_start_S1=torch.tensor(starts, dtype=torch.int32, device=device),
            context_S=torch.full((num_sequences,), context, dtype=torch.int32, device=device),
            pages_SM=pages_SM,
            slots_T=page_T * PAGE_TOKENS + positions_T % PAGE_TOKENS,
        )
        kv_SCWD = self.pool.kv_PLBCD[pages_SM.long(), 0].flatten(1, 2)[:, :context]
        keys, values = kv_SCWD.transpose(1, 2).chunk(2, dim=1)
        self.keys, self.values = keys.contiguous(), values.contiguous()
        queries = self.qkv_TE[:, : SHAPE.num_heads * SHAPE.head_dim]
        self.queries = queries.view(num_sequences, num_queries, SHAPE.num_heads, -1).transpose(1, 2).contiguous()
        distance = torch.arange(context - num_queries, context, device=device).unsqueeze(1)
        self.mask = distance >= torch.arange(context, device=device)
        self.is_square = num_queries == context

    @property
    def arguments(self) -> tuple[torch.Tensor, KVPool, int, AttentionBatch, AttentionShape]:
        return self.qkv_TE, self.pool, 0, self.batch, SHAPE

    def run_torch(self) -> torch.Tensor:
        if self.is_square:
            return F.scaled_dot_product_attention(
                self.queries, self.keys, self.values, is_causal=True, scale=SHAPE.scale, enable_gqa=True
            )
        mask = None if self.queries.shape[2] == 1 else self.mask
        return F.scaled_dot_product_attention(
            self.queries, self.keys, self.values, attn_mask=mask, scale=SHAPE.scale, enable_gqa=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU and a CUDA build of PyTorch")
    device = torch.device("cuda")
    figures = measure(device)
    columns = (
        ("S", 4),
        ("queries", 8),
        ("context", 8),
        ("ours ms", 9),
        ("torch ms", 9),
        ("floor ms", 9),
        ("x floor", 8),
    )
    print("kind    ", *(name.rjust(width) for name, width in columns))
    for it in figures:
        print(
            f"{it.kind:8} {it.num_sequences:4} {it.num_queries:8} {it.context:8} {it.ours_ms:9.4f} {it.torch_ms:9.4f} "
            f"{it.floor_ms:9.4f} {it.ours_ms / it.floor_ms:8.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(it) for it in figures], indent=1))


def measure(device: torch.device) -> list[Figures]:
    """Every case."""
    from rekindle.engine.kernels.gpu.attention import attention

    bytes_per_s, operations_per_s = _rates(device)
    figures = []
    for kind, num_sequences, num_queries, context in CASES:
        case = Case(num_sequences, num_queries, context, device)
        ours = attention(*case.arguments)
        theirs = case.run_torch().transpose(1, 2).reshape(ours.shape)
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not error < 1e-2:
            sys.exit(f"{kind} of {num_sequences} x {num_queries} over {context}: differs from torch by {error:.2%}")
        kv_bytes = num_sequences * context * 2 * SHAPE.num_kv_heads * SHAPE.head_dim * 2
        seen = num_sequences * num_queries * (context - (num_queries - 1) / 2)
        operations = 4 * seen * SHAPE.num_heads * SHAPE.head_dim
        figures.append(
            Figures(
                kind,
                num_sequences,
                num_queries,
                context,
                # A prefill's tiles are laid out by the host, which no graph records.
                _milliseconds(partial(attention, *case.arguments), is_recorded=kind == "decode"),
                _milliseconds(case.run_torch, is_recorded=kind == "decode"),
                1e3 * max(kv_bytes / bytes_per_s, operations / operations_per_s),
            )
        )
    return figures


def _rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second read by a copy (counting reads and writes), and bf16 operations a second of a matrix product."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    copy_s = _milliseconds(lambda: target.copy_(source)) / 1e3
    matrix = torch.randn(8192, 8192, dtype=torch.bfloat16, device=device)
    product_s = _milliseconds(lambda: matrix @ matrix) / 1e3
    return 2 * source.nbytes / copy_s, 2 * 8192**3 / product_s


def _milliseconds(function: Callable[[], object], *, is_recorded: bool = True) -> float:
    """Median time of one call, from events around some calls, replayed from a graph or made one by one."""

    def calls() -> None:
        for _ in range(_CALLS):
            function()

    calls()
    torch.cuda.synchronize()
    if is_recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            calls()
        calls = graph.replay
    times = []
    for _ in range(_REPETITIONS):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        calls()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / _CALLS)
    return statistics.median(times)


if __name__ == "__main__":
    main()
