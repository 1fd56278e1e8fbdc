"""Time the grouped low-rank update on a CUDA GPU: `python benchmarks/gpu/lora.py [--rows 1 8 64 256]`.

Each cell updates the output of one projection group of an 8B Llama for rows spread evenly over adapters of random ranks
8 to 64, whose matrices lie in scattered pages of 2 MiB. Decode cells run the launches of a captured size, prefill cells
the fitted ones. A cell is a CUDA graph that updates many layers one after the other, so that the weights of one replay
exceed the L2 cache several times; the time is that of one layer (two launches): the median of replays, by events.

`floor` is the time to move each adapter's matrices, the rows and the outputs (read and written) once at the rate of a
large device-to-device copy, measured first. `torch` is two matrix products and one addition for each adapter and
projection, from contiguous copies, in a CUDA graph too. `error` is the norm of the difference from float32 over the
norm of the update.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rekindle.engine.kernels.gpu.lora import GroupedLora
from rekindle.engine.kernels.interface import (
    LORA_FIELDS,
    PROJECTIONS,
    AdapterMatrices,
    LoraBatch,
    LoraGroup,
    make_lora_batch,
)

PAGE_ELEMENTS = 1 << 20
MAX_RANK = 64
L2_BYTES_EXCEEDED = 200_000_000
MAX_LAYERS = 256
COPY_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """One projection group: its first table column, input features and output sizes."""

    first: int
    in_features: int
    out_sizes: tuple[int, ...]

    def group(self) -> LoraGroup:
        offsets = itertools.accumulate(self.out_sizes[:-1], initial=0)
        return LoraGroup(self.first, tuple(offsets), self.out_sizes)


LLAMA_8B = {
    "qkv": Shape(0, 4096, (4096, 1024, 1024)),
    "output": Shape(3, 4096, (4096,)),
    "gate_up": Shape(4, 4096, (14336, 14336)),
    "down": Shape(6, 14336, (4096,)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs of one cell. `matrices` holds (rows, first column, A, B transposed, scale) of each update, by layer, in
    contiguous memory."""

    batch: LoraBatch
    group: LoraGroup
    x_TK: torch.Tensor
    y_TN: torch.Tensor
    matrices: list[list[tuple[slice, int, torch.Tensor, torch.Tensor, float]]]
    bytes_moved: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table, in microseconds for one layer; `spread` is that between replays over their median."""

    group: str
    kind: str
    rows: int
    adapters: int
    floor_us: float
    grouped_us: float
    torch_us: float
    spread: float
    error: float


def build(
    shape: Shape, ranks: list[int], num_rows: int, num_layers: int, device: torch.device, page_elements: int
) -> Case:
    """Random adapters of these ranks in scattered pages, over evenly divided rows."""
    table_LPF, lengths = [], []
    for rank in ranks:
        table, length = _table(shape, rank, num_layers)
        table_LPF.append(table)
        lengths.append(-(-length // page_elements))
    pages = torch.split(torch.randperm(sum(lengths)).to(torch.int32), lengths)
    pool_PX = torch.empty(sum(lengths), page_elements, dtype=torch.bfloat16, device=device)
    for page in pool_PX:
        page.normal_(std=0.02)
    x_TK = torch.randn(num_rows, shape.in_features, device=device).to(torch.bfloat16)
    y_TN = (torch.randn(num_rows, sum(shape.out_sizes), device=device) * 0.02).to(torch.bfloat16)
    starts = [round(i * num_rows / len(ranks)) for i in range(len(ranks) + 1)]
    adapters = [
        AdapterMatrices(table.to(device), rank, pages_M=mine.to(device))
        for table, mine, rank in zip(table_LPF, pages, ranks, strict=True)
    ]
    group = shape.group()
    matrices: list[list[tuple[slice, int, torch.Tensor, torch.Tensor, float]]] = [[] for _ in range(num_layers)]
    for g, (table, mine) in enumerate(zip(table_LPF, pages, strict=True)):
        vector = pool_PX[mine.long().to(device)].flatten()
        for layer, i in itertools.product(range(num_layers), range(len(shape.out_sizes))):
            a_offset, b_offset, rank, _ = table[layer, shape.first + i].tolist()
            a_RK = vector[a_offset : a_offset + rank * shape.in_features].view(rank, -1)
            b_RN = vector[b_offset : b_offset + rank * shape.out_sizes[i]].view(rank, -1)
            matrices[layer].append((slice(starts[g], starts[g + 1]), group.out_offsets[i], a_RK, b_RN, _scale(rank)))
    weights = sum(a.numel() + b.numel() for _, _, a, b, _ in matrices[0])
    bytes_moved = 2 * (weights + x_TK.numel() + 2 * y_TN.numel())
    return Case(make_lora_batch(starts, adapters, pool_PX), group, x_TK, y_TN, matrices, bytes_moved)


def _scale(rank: int) -> float:
    return 16 / rank


def _table(shape: Shape, rank: int, num_layers: int) -> tuple[torch.Tensor, int]:
    """The table of one adapter, all layers alike, and the length of its vector."""
    table_LPF = torch.zeros(num_layers, len(PROJECTIONS), LORA_FIELDS, dtype=torch.int64)
    (scale_bits,) = struct.unpack("q", struct.pack("d", _scale(rank)))
    length = 0
    for layer, (i, size) in itertools.product(range(num_layers), enumerate(shape.out_sizes)):
        b_offset = length + rank * shape.in_features
        table_LPF[layer, shape.first + i] = torch.tensor([length, b_offset, rank, scale_bits])
        length = b_offset + rank * size
    return table_LPF, length


def update_grouped(case: Case, lora: GroupedLora, layers: range) -> None:
    """The kernels under test."""
    for layer in layers:
        lora.lora(case.x_TK, case.y_TN, case.batch, layer, case.group)


def update_torch(case: Case, layers: range) -> None:
    """What one would write without them."""
    for layer in layers:
        for rows, column, a_RK, b_RN, scale in case.matrices[layer]:
            target = case.y_TN[rows, column : column + b_RN.shape[1]]
            target.addmm_(case.x_TK[rows] @ a_RK.T, b_RN, alpha=scale)


def relative_error(case: Case, lora: GroupedLora, layer: int) -> float:
    """How far one grouped update is from float32, over the norm of the update."""
    before = case.y_TN.float()
    exact = before.clone()
    for rows, column, a_RK, b_RN, scale in case.matrices[layer]:
        exact[rows, column : column + b_RN.shape[1]] += (
            (case.x_TK[rows].float() @ a_RK.float().T) @ b_RN.float() * scale
        )
    update_grouped(case, lora, range(layer, layer + 1))
    return float((case.y_TN.float() - exact).norm() / (exact - before).norm())


def replay_us(work: Callable[[], object], replays: int = 30) -> list[float]:
    """Microseconds of each replay of a graph that captured `work`, after a few that are not counted."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return times[3:]


def copy_bytes_per_us() -> float:
    """Bytes read and written in a microsecond by a large copy."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / statistics.median(replay_us(lambda: target.copy_(source)))


def measure(name: str, kind: str, num_rows: int, num_adapters: int, bytes_per_us: float) -> Cell:
    """Build and time one cell."""
    shape = LLAMA_8B[name]
    torch.manual_seed(num_rows * 1000 + num_adapters)
    ranks = [(8, 16, 32, 64)[int(choice)] for choice in torch.randint(0, 4, (num_adapters,))]
    layer_bytes = 2 * sum(rank * (shape.in_features + size) for rank in ranks for size in shape.out_sizes)
    num_layers = min(MAX_LAYERS, max(4, math.ceil(L2_BYTES_EXCEEDED / layer_bytes)))
    case = build(shape, ranks, num_rows, num_layers, torch.device("cuda"), PAGE_ELEMENTS)
    if kind == "decode":
        case = replace(case, batch=replace(case.batch, adapters=(), max_rank=MAX_RANK))
    lora = GroupedLora()
    error = relative_error(case, lora, num_layers - 1)
    layers = range(num_layers)
    grouped_us = replay_us(lambda: update_grouped(case, lora, layers))
    torch_us = replay_us(lambda: update_torch(case, layers))
    return Cell(
        name,
        kind,
        num_rows,
        num_adapters,
        floor_us=case.bytes_moved / bytes_per_us,
        grouped_us=statistics.median(grouped_us) / num_layers,
        torch_us=statistics.median(torch_us) / num_layers,
        spread=(max(grouped_us) - min(grouped_us)) / statistics.median(grouped_us),
        error=error,
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure all cells, print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=LLAMA_8B, default=list(LLAMA_8B))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="decode rows")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 512], help="at most one for each row")
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048], help="prefill rows, of 1 and of 8 adapters")
    parser.add_argument("--output", type=Path, default=Path("lora_gpu.json"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA GPU, and torch sees none here")
    decode = sorted({(rows, min(adapters, rows)) for rows in options.rows for adapters in options.adapters})
    kinds = [("decode", *cell) for cell in decode]
    kinds += [("prefill", rows, min(adapters, rows)) for rows in options.prefill for adapters in (1, 8)]
    bytes_per_us = copy_bytes_per_us()
    device = torch.cuda.get_device_name()
    cells = []
    for name, (kind, rows, adapters) in itertools.product(options.groups, kinds):
        cells.append(measure(name, kind, rows, adapters, bytes_per_us))
        torch.cuda.empty_cache()
    options.output.write_text(
        json.dumps({"device": device, "copy_bytes_per_us": bytes_per_us, "cells": [asdict(cell) for cell in cells]})
    )
    print(f"{device}, copy {bytes_per_us / 1e6:.2f} TB/s; microseconds for one layer")
    print("group    kind      rows  adapters   floor  grouped  x floor    torch  spread   error")
    for cell in cells:
        print(
            f"{cell.group:8} {cell.kind:8} {cell.rows:5} {cell.adapters:9} {cell.floor_us:7.1f} {cell.grouped_us:8.1f} "
            f"{cell.grouped_us / cell.floor_us:8.2f} {cell.torch_us:8.1f} {cell.spread:7.0%} {cell.error:7.1e}"
        )


if __name__ == "__main__":
    main()
