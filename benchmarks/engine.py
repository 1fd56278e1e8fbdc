"""Time one engine on the demo model: `python benchmarks/engine.py [--concurrency 1 8 32] [--adapters 0 1 8 32]`.

Every cell runs C sequences at once, each with a prompt of 128 random tokens and 48 new tokens, spread evenly over N
random adapters of ranks 8, 16, 32 and 64 on q, k, v and o. Decode steps are timed once all prompts are computed.
`python` is the part of a decode step outside kernels and sampling; `floor` is the time that reading weights, adapters
and KV cache once would take at the memory rate measured first.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rekindle.bench.hardware import read_rate
from rekindle.bench.random_adapters import ATTENTION, write_random_adapter
from rekindle.clock import SystemClock
from rekindle.engine.engine import Engine
from rekindle.engine.kernels.native_kernels import NativeKernels, NativeLinear
from rekindle.engine.runner import Runner
from rekindle.protocol.adapters import ADAPTER_FILE_NAME, AdapterManifest
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.store.safetensors_file import DTYPE_BYTES
from rekindle.units import GIB

GGUF = Path(__file__).parent.parent / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT_TOKENS, NEW_TOKENS = 128, 48
RANKS = (8, 16, 32, 64)


class Timers:
    """Seconds spent in kernels and in sampling, summed by wrapping their functions."""

    def __init__(self) -> None:
        self.kernels_s = 0.0
        self.sampling_s = 0.0
        for name in ("rms_norm", "add_rms_norm", "rope_and_store", "attention", "gated_activation", "lora"):
            self._wrap(NativeKernels, name, "kernels_s")
        self._wrap(NativeLinear, "__call__", "kernels_s")
        self._wrap(Runner, "_sample", "sampling_s")

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

    def reset(self) -> None:
        self.kernels_s = self.sampling_s = 0.0


def main() -> None:
    """Measure all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[0, 1, 8, 32])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(Path(directory), max(arguments.adapters), arguments.threads)
        print(f"memory read rate {bench.read_rate / 1e9:.1f} GB/s; model {bench.model_bytes / 1e6:.0f} MB")
        print("  C  adapters  prefill tok/s  decode ms/step  floor ms  python %  sampling %  tok/s  of base")
        for concurrency in arguments.concurrency:
            base_step_s: float | None = None
            for num_adapters in arguments.adapters:
                if num_adapters > concurrency:
                    continue
                cell = bench.measure(concurrency, num_adapters, arguments.repetitions)
                base_step_s = cell["step_s"] if base_step_s is None else base_step_s
                print(
                    f"{concurrency:3d}  {num_adapters:8d}  {cell['prefill']:13.0f}  {cell['step_s'] * 1e3:14.2f}"
                    f"  {cell['floor_s'] * 1e3:8.2f}  {cell['python'] * 100:8.1f}  {cell['sampling'] * 100:10.1f}"
                    f"  {concurrency / cell['step_s']:5.0f}  {base_step_s / cell['step_s']:7.2f}",
                    flush=True,
                )
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

    def measure(self, concurrency: int, num_adapters: int, repetitions: int) -> dict[str, float]:
        """Medians of one cell, after one unmeasured run."""
        runs = [self._run(concurrency, num_adapters, seed) for seed in range(repetitions + 1)][1:]
        median = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        adapters = self._adapters[:num_adapters]
        adapter_bytes = sum(adapter.num_elements * DTYPE_BYTES["BF16"] for adapter in adapters)
        kv_bytes = concurrency * (PROMPT_TOKENS + NEW_TOKENS // 2) * self.engine.ready.page_bytes / 16
        return {**median, "floor_s": (self.model_bytes + adapter_bytes + kv_bytes) / self.read_rate}

    def _run(self, concurrency: int, num_adapters: int, seed: int) -> dict[str, float]:
        draw = random.Random(seed)
        started_s = time.perf_counter()
        for i in range(concurrency):
            adapter = self._adapters[i % num_adapters].digest if num_adapters else None
            self.engine.submit(_request(f"{seed}-{i}", draw, adapter))
        num_started = 0
        while num_started < concurrency:
            num_started += sum(chunk.offset == 0 for chunk in self.engine.step())
        prefilled_s = time.perf_counter()
        self._timers.reset()
        num_steps = 0
        while self.engine.has_runnable:
            num_steps += bool(self.engine.step())
        decode_s = time.perf_counter() - prefilled_s
        timers = self._timers
        return {
            "prefill": concurrency * PROMPT_TOKENS / (prefilled_s - started_s),
            "step_s": decode_s / num_steps,
            "python": (decode_s - timers.kernels_s - timers.sampling_s) / decode_s,
            "sampling": timers.sampling_s / decode_s,
        }


def _request(name: str, draw: random.Random, adapter: AdapterDigest | None) -> GenerateRequest:
    prompt = tuple(draw.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS))
    return GenerateRequest(
        RequestId(name), prompt, SamplingParams(NEW_TOKENS, seed=0, temperature=0.0), adapter=adapter
    )


if __name__ == "__main__":
    main()
