"""Time one engine on the demo model: `python benchmarks/engine.py [--concurrency 1 8 32] [--adapters 0 1 8 32 64]`.

Every cell runs C sequences at once, each with a prompt of 128 random tokens and 48 new tokens, over N random adapters
of ranks 8, 16, 32 and 64 on q, k, v and o; where N > C, runs take them in turn. A decode step is the median of the
steps after all prompts were computed, prefill the best run. The cells of one C take turns, so that what else the
machine does falls on all of them. No two runs share a prompt: cached prefixes would count as computed.

`floor` is the time that reading weights, adapters and KV cache once would take at the memory rate measured first.
`allowed` is what adapters may cost: 1.1 times what the base takes, and 1.3 times reading each adapter in every step
that needs it. `python` is the part of decoding outside kernels and sampling.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rekindle.bench.hardware import read_rate
from rekindle.bench.random_adapters import ATTENTION, write_random_adapter
from rekindle.clock import SystemClock
from rekindle.engine.engine import Engine
from rekindle.engine.kernels.interface import KVPool
from rekindle.engine.kernels.native_kernels import NativeKernels, NativeLinear
from rekindle.engine.models.decoder import Decoder, ForwardBatch
from rekindle.engine.runner import Runner
from rekindle.protocol.adapters import ADAPTER_FILE_NAME, AdapterManifest
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.units import GIB

GGUF = Path(__file__).parent.parent / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT_TOKENS, NEW_TOKENS = 128, 48
RANKS = (8, 16, 32, 64)


ALLOWED_OF_BASE, ALLOWED_OF_READING = 1.1, 1.3


class Timers:
    """Seconds in kernels and in sampling, and bytes of adapters that steps needed, found by wrapping functions."""

    def __init__(self) -> None:
        self.reset()
        for name in ("rms_norm", "add_rms_norm", "rope_and_store", "attention", "gated_activation", "lora"):
            self._wrap(NativeKernels, name, "kernels_s")
        self._wrap(NativeLinear, "__call__", "kernels_s")
        self._wrap(Runner, "_sample", "sampling_s")
        self._count_adapters()

    def reset(self) -> None:
        self.kernels_s = self.sampling_s = 0.0
        self.adapter_bytes = 0

    def _wrap(self, owner: type, name: str, total: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any) -> Any:
            before_s, started_s = self.kernels_s, time.perf_counter()
            result = inner(*arguments)
            inside_s = time.perf_counter() - started_s
            nested_s = self.kernels_s - before_s if total == "sampling_s" else 0.0
            setattr(self, total, getattr(self, total) + inside_s - nested_s)
            return result

        setattr(owner, name, timed)

    def _count_adapters(self) -> None:
        inner = Decoder.forward

        def counted(decoder: Decoder, embedded_TH: torch.Tensor, batch: ForwardBatch, pool: KVPool) -> torch.Tensor:
            if batch.lora is not None:
                vectors = [adapter.vector for adapter in batch.lora.adapters if adapter is not None]
                self.adapter_bytes += sum(vector.nbytes for vector in vectors if vector is not None)
            return inner(decoder, embedded_TH, batch, pool)

        setattr(Decoder, "forward", counted)  # noqa: B010


@dataclass(slots=True)
class Cell:
    """What the runs of one cell took, and the adapter bytes that their prefills and decode steps needed."""

    prefill_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    prefill_bytes: list[int] = field(default_factory=list)
    step_bytes: list[float] = field(default_factory=list)
    python: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)

    def row(self, base: Cell, concurrency: int, read_rate: float, floor_bytes: float) -> str:
        def allowed_s(base_s: float, num_bytes: float) -> float:
            return ALLOWED_OF_BASE * base_s + ALLOWED_OF_READING * num_bytes / read_rate

        prefill_s, base_prefill_s = min(self.prefill_s), min(base.prefill_s)
        prefill_bytes, step_bytes = statistics.mean(self.prefill_bytes), statistics.mean(self.step_bytes)
        floor_s = (floor_bytes + step_bytes) / read_rate
        step_s, base_step_s = statistics.median(self.steps_s), statistics.median(base.steps_s)
        return (
            f"{concurrency * PROMPT_TOKENS / prefill_s:5.0f}  {prefill_s * 1e3:6.0f}"
            f"  {allowed_s(base_prefill_s, prefill_bytes) * 1e3:7.0f}  {step_s * 1e3:5.1f}"
            f"  {allowed_s(base_step_s, step_bytes) * 1e3:7.1f}  {floor_s * 1e3:5.1f}"
            f"  {statistics.median(self.python) * 100:8.1f}  {statistics.median(self.sampling) * 100:10.1f}"
            f"  {concurrency / step_s:5.0f}  {base_step_s / step_s:7.2f}"
        )


def main() -> None:
    """Measure all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32, 64], help="0 is always measured")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    counts = sorted({0, *arguments.adapters})
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), max(counts), arguments.threads)
        print(f"memory read rate {bench.read_rate / 1e9:.1f} GB/s; model {bench.model_bytes / 1e6:.0f} MB")
        print("              prefill ms              decode ms a step")
        print("  C  adapters  tok/s    took  allowed   took  allowed  floor  python %  sampling %  tok/s  of base")
        for concurrency in arguments.concurrency:
            bench.measure(concurrency, counts, arguments.repetitions)
        bench.engine.close()


class Bench:
    """An engine with the demo model and random adapters."""

    def __init__(self, directory: Path, num_adapters: int, threads: int) -> None:
        home = Home(directory / "home")
        self._manifest = import_model(GGUF, home)
        model_dir = home.model_directory(self._manifest.digest)
        settings = EngineSettings(
            str(model_dir), self._manifest, "bfloat16", 2 * GIB, 16, 512, 256, 1024, threads
        )  # fmt: skip
        self._timers = Timers()
        self._num_runs = 0
        self.engine = Engine(settings, SystemClock(), lambda: None)
        self.read_rate = read_rate(threads)
        self.model_bytes = self._manifest.num_bytes
        self._adapters: list[AdapterManifest] = []
        for i in range(num_adapters):
            source = directory / f"adapter-{i}"
            write_random_adapter(source, self._manifest, RANKS[i % len(RANKS)], ATTENTION, seed=i)
            manifest = import_adapter(source, self._manifest, model_dir, home)
            self.engine.add_adapter(manifest, str(home.adapter_directory(manifest.digest) / ADAPTER_FILE_NAME))
            self._adapters.append(manifest)
        if num_adapters:
            self._run(Cell(), num_adapters, num_adapters)  # loads them all

    def measure(self, concurrency: int, counts: list[int], repetitions: int) -> None:
        """Print the row of each number of adapters, after one unmeasured run of each."""
        cells = {count: Cell() for count in counts}
        for count in counts:
            self._run(Cell(), concurrency, count)
        for _ in range(repetitions):
            for count, cell in cells.items():
                self._run(cell, concurrency, count)
        kv_bytes = concurrency * (PROMPT_TOKENS + NEW_TOKENS // 2) * self.engine.ready.page_bytes / 16
        for count, cell in cells.items():
            row = cell.row(cells[0], concurrency, self.read_rate, self.model_bytes + kv_bytes)
            print(f"{concurrency:3d}  {count:8d}  {row}", flush=True)

    def _run(self, cell: Cell, concurrency: int, num_adapters: int) -> None:
        """One run, added to `cell`."""
        self._num_runs += 1
        draw, timers = random.Random(self._num_runs), self._timers
        timers.reset()
        started_s = time.perf_counter()
        for i in range(concurrency):
            turn = self._num_runs * concurrency + i
            adapter = self._adapters[turn % num_adapters].digest if num_adapters else None
            self.engine.submit(_request(f"{self._num_runs}-{i}", draw, adapter))
        num_started = 0
        while num_started < concurrency:
            num_started += sum(chunk.offset == 0 for chunk in self.engine.step())
        prefilled_s = time.perf_counter()
        cell.prefill_s.append(prefilled_s - started_s)
        cell.prefill_bytes.append(timers.adapter_bytes)
        timers.reset()
        num_steps, before_s = 0, prefilled_s
        while self.engine.has_runnable:
            if self.engine.step():
                after_s = time.perf_counter()
                cell.steps_s.append(after_s - before_s)
                num_steps, before_s = num_steps + 1, after_s
        decode_s = before_s - prefilled_s
        cell.step_bytes.append(timers.adapter_bytes / num_steps)
        cell.python.append((decode_s - timers.kernels_s - timers.sampling_s) / decode_s)
        cell.sampling.append(timers.sampling_s / decode_s)


def _request(name: str, draw: random.Random, adapter: AdapterDigest | None) -> GenerateRequest:
    prompt = tuple(draw.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS))
    return GenerateRequest(
        RequestId(name), prompt, SamplingParams(NEW_TOKENS, seed=0, temperature=0.0), adapter=adapter
    )


if __name__ == "__main__":
    main()
