"""A whole engine on a GPU: random weights of an 8B Llama shape, many adapters, against the same engine without any.

    PYTHONPATH=src python benchmarks/gpu/whole_engine.py [--json FILE]

C sequences decode at once, spread evenly over the adapters. `floor` is what the adapters' bytes would take at the rate
of a device-to-device copy; `allowed` is 1.05 x the base step + 1.3 x that. The same base under transformers and PEFT
generates with as many adapters in one batch. Against merged: with one adapter merged into the weights, a step is
allowed 1.02 x the base step.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rekindle.clock import SystemClock
from rekindle.engine import engine as engine_module
from rekindle.engine.devices import CudaDevice, Device
from rekindle.engine.engine import Engine
from rekindle.engine.scheduler.merging import MergeChoice, MergePolicy, StepMix
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.testing.random_model import RandomWeights, model_manifest, named, write_adapter

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
RANKS = (8, 16, 32, 64)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
PROMPT_TOKENS = 64
NEW_TOKENS = 48
CELLS = ((1, 0), (1, 1), (8, 0), (8, 8), (64, 0), (64, 1), (64, 8), (64, 64), (512, 0), (512, 512))
MERGED_CONCURRENCIES = (8, 64)
PEFT_CELLS = ((8, 0), (8, 8), (64, 0), (64, 8), (64, 64))


@dataclass(frozen=True)
class Cell:
    """One line of the result."""

    system: str
    concurrency: int
    num_adapters: int
    step_ms: float
    tokens_per_s: float
    floor_ms: float | None = None
    allowed_ms: float | None = None


class BenchedEngine:
    """An engine on random weights, with adapters of random contents that share one file for each rank."""

    def __init__(
        self,
        config: dict[str, Any],
        device: Device,
        num_adapters: int,
        directory: Path,
        memory_bytes: int = 0,
        *,
        merge_in_place: bool = False,
    ) -> None:
        (directory / "config.json").write_text(json.dumps(config))
        model = model_manifest(config)
        settings = EngineSettings(
            str(directory), model, "bfloat16", memory_bytes, 16, 4096, 512, 4096, num_threads=8, device="cuda",
            merge_in_place=merge_in_place,
        )  # fmt: skip
        weights = RandomWeights(config, torch.bfloat16, device.torch_device)
        self.engine = Engine(settings, SystemClock(), lambda: None, device, weights)
        self._vocabulary = model.vocab_size
        files = [(rank, directory / f"rank-{rank}.safetensors") for rank in RANKS]
        written = [(write_adapter(model, TARGETS, rank, path), path) for rank, path in files]
        self.adapters = []
        for manifest, path in named(written, num_adapters):
            self.engine.add_adapter(manifest, str(path))
            self.adapters.append(manifest)

    def measure(self, concurrency: int, num_adapters: int, new_tokens: int = NEW_TOKENS) -> float:
        """Median seconds of the steps in which all sequences decode, after a run that loads, compiles and records."""
        self._run(concurrency, num_adapters, "warm", new_tokens)
        return statistics.median(self._run(concurrency, num_adapters, "timed", new_tokens))

    def _run(self, concurrency: int, num_adapters: int, name: str, new_tokens: int) -> list[float]:
        draw = random.Random(0)
        for i in range(concurrency):
            adapter = self.adapters[i % num_adapters].digest if num_adapters else None
            prompt = tuple(draw.randrange(self._vocabulary) for _ in range(PROMPT_TOKENS))
            sampling = SamplingParams(new_tokens, seed=0, temperature=0.0)
            self.engine.submit(GenerateRequest(RequestId(f"{name}-{i}"), prompt, sampling, adapter=adapter))
        times = []
        while self.engine.stats().num_running or self.engine.stats().num_waiting:
            started_s = time.perf_counter()
            chunks = self.engine.step()
            elapsed_s = time.perf_counter() - started_s
            if len(chunks) == concurrency and all(chunk.offset for chunk in chunks):
                times.append(elapsed_s)
        return times


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a device-to-device copy reads and writes together."""
    source = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started_s)
    return 2 * source.numel() / min(times)


def bench_rekindle(device: Device, rate: float) -> list[Cell]:
    """Every cell of `CELLS`."""
    with tempfile.TemporaryDirectory() as directory:
        bench = BenchedEngine(LLAMA_8B, device, max(adapters for _, adapters in CELLS), Path(directory))
        cells: list[Cell] = []
        base_s: dict[int, float] = {}
        for concurrency, num_adapters in CELLS:
            step_s = bench.measure(concurrency, num_adapters)
            floor_ms = allowed_ms = None
            if num_adapters:
                num_bytes = sum(2 * it.num_elements for it in bench.adapters[: min(num_adapters, concurrency)])
                floor_ms = 1e3 * num_bytes / rate
                allowed_ms = 1e3 * 1.05 * base_s[concurrency] + 1.3 * floor_ms
            else:
                base_s[concurrency] = step_s
            cells.append(
                Cell("rekindle", concurrency, num_adapters, 1e3 * step_s, concurrency / step_s, floor_ms, allowed_ms)
            )
        bench.engine.close()
    return cells


class SwitchedPolicy(MergePolicy):
    """Merges `target` in every step that has rows of it."""

    target: AdapterDigest | None = None

    def choose(self, mix: StepMix, now_s: float) -> MergeChoice:
        self.merged = self.target if self.target in mix.rows_of else None
        self.num_merged_steps += self.merged is not None
        return MergeChoice(self.merged)


def bench_merged(
    device: Device, config: dict[str, Any] = LLAMA_8B, memory_bytes: int = 0, new_tokens: int = NEW_TOKENS
) -> list[Cell]:
    """One adapter merged into the weights, against the same engine with it beside them, and with none.

    Raises:
        RuntimeError: the engine has not merged it.
    """
    vars(engine_module)["MergePolicy"] = SwitchedPolicy
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as directory:
        bench = BenchedEngine(config, device, 1, Path(directory), memory_bytes, merge_in_place=True)
        policy = bench.engine._merge_policy
        assert isinstance(policy, SwitchedPolicy)
        for concurrency in MERGED_CONCURRENCIES:
            base_s = bench.measure(concurrency, 0, new_tokens)
            beside_s = bench.measure(concurrency, 1, new_tokens)
            policy.target, before = bench.adapters[0].digest, bench.engine.stats().steps_merged_total
            merged_s = bench.measure(concurrency, 1, new_tokens)
            if bench.engine.stats().steps_merged_total < before + 2 * new_tokens:
                raise RuntimeError(f"with {concurrency} sequences the adapter was not merged in every step")
            policy.target = None
            for system, num_adapters, step_s, allowed_ms in (
                ("against merged: base", 0, base_s, None),
                ("against merged: beside", 1, beside_s, None),
                ("against merged: merged", 1, merged_s, 1e3 * 1.02 * base_s),
            ):
                tokens_per_s = concurrency / step_s
                cells.append(Cell(system, concurrency, num_adapters, 1e3 * step_s, tokens_per_s, allowed_ms=allowed_ms))
        bench.engine.close()
    return cells


def bench_peft(device: torch.device) -> list[Cell]:
    """transformers and PEFT with the adapters of each row named for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{key: value for key, value in LLAMA_8B.items() if key != "model_type"})
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model: Any = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    most = max(adapters for _, adapters in PEFT_CELLS)
    for i in range(most):
        lora = LoraConfig(r=RANKS[i % len(RANKS)], target_modules=list(TARGETS), init_lora_weights=False)
        if i == 0:
            model = get_peft_model(model, lora, adapter_name="adapter-0")
        else:
            model.add_adapter(f"adapter-{i}", lora)
    model = model.to(device=device, dtype=torch.bfloat16).eval()
    cells = []
    for concurrency, num_adapters in PEFT_CELLS:
        names = [f"adapter-{i % num_adapters}" if num_adapters else "__base__" for i in range(concurrency)]
        tokens = torch.randint(0, config.vocab_size, (concurrency, PROMPT_TOKENS), device=device)
        times = []
        for num_tokens in (2, 2, 2 + NEW_TOKENS):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), adapter_names=names, do_sample=False,
                min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=0,
            )  # fmt: skip
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started_s)
        step_s = (times[2] - times[1]) / NEW_TOKENS
        cells.append(Cell("transformers + PEFT", concurrency, num_adapters, 1e3 * step_s, concurrency / step_s))
    return cells


def free_memory() -> None:
    """Give back what an engine or a model that is out of use has held."""
    gc.collect()
    torch.cuda.empty_cache()


def report(cells: Sequence[Cell]) -> None:
    """Print the table."""
    print(f"{'system':24} {'C':>4} {'adapters':>8} {'step ms':>8} {'tok/s':>8} {'floor ms':>8} {'allowed':>8}")
    for cell in cells:
        floor = "" if cell.floor_ms is None else f"{cell.floor_ms:.2f}"
        allowed = "" if cell.allowed_ms is None else f"{cell.allowed_ms:.2f}"
        print(
            f"{cell.system:24} {cell.concurrency:4} {cell.num_adapters:8} {cell.step_ms:8.2f} "
            f"{cell.tokens_per_s:8.0f} {floor:>8} {allowed:>8}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--no-peft", action="store_true", help="leave transformers and PEFT out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU and a CUDA build of PyTorch")
    device = CudaDevice("cuda")
    rate = copy_rate(device.torch_device)
    cells = bench_rekindle(device, rate)
    free_memory()
    cells += bench_merged(device)
    free_memory()
    if not arguments.no_peft:
        cells += bench_peft(device.torch_device)
    name = torch.cuda.get_device_name()
    print(f"{name}, PyTorch {torch.__version__}, copies at {rate / 1e9:.0f} GB/s")
    report(cells)
    if arguments.json:
        figures = {"device": name, "copy_bytes_per_s": rate, "cells": [asdict(cell) for cell in cells]}
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
