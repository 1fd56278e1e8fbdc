"""How long choosing tokens takes, by vocabulary, rows and settings; on a GPU where there is one.

    python benchmarks/sampling.py

Prints the least and the median time of a call in ms: on a CPU that of the process, with one thread, so that neighbours
disturb it little; on a GPU that of the clock, until the host has the tokens.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from rekindle.engine.sampling import SampleRow, sample
from rekindle.protocol.sampling import SamplingParams

VOCABULARIES = (49_152, 128_256)
ROWS = (1, 32)
MIN_CALLS = 5
MIN_TIME_S = 0.6
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "no filter": {},
    "top_p": {"top_p": 0.9},
    "top_k, top_p": {"top_k": 50, "top_p": 0.95},
    "min_p": {"min_p": 0.05},
    "penalties": {"top_p": 0.9, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {"top_p": 0.9, "logprobs": 5},
    "hot top_p": {"top_p": 0.99, "temperature": 5.0},
}


def main() -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}; ms per call, least and median")
    for vocabulary in VOCABULARIES:
        for num_rows in ROWS:
            logits_RV = _logits(num_rows, vocabulary).to(device)
            for name, changes in SETTINGS.items():
                times_ms = [seconds * 1e3 for seconds in _times_s(logits_RV, changes)]
                print(
                    f"{vocabulary:7} tokens, {num_rows:2} rows, {name:12} "
                    f"{min(times_ms):7.2f} {statistics.median(times_ms):7.2f}"
                )


def _logits(num_rows: int, vocabulary: int) -> torch.Tensor:
    """A broad bulk under 40 likelier tokens, with bfloat16's many equals: flatter than most text, which is harder."""
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(num_rows, vocabulary, generator=generator) * 2.5
    likely = torch.randint(0, vocabulary, (num_rows, 40), generator=generator)
    logits_RV.scatter_add_(1, likely, torch.rand(num_rows, 40, generator=generator) * 12)
    return logits_RV.bfloat16().float()


def _times_s(logits_RV: torch.Tensor, changes: dict[str, Any]) -> list[float]:
    clock = time.perf_counter if logits_RV.is_cuda else time.process_time
    rows = [
        SampleRow(SamplingParams(**{"max_tokens": 4096, "seed": seed, **changes}), range(500), range(100, 300))
        for seed in range(len(logits_RV))
    ]
    sample(logits_RV, rows)
    times_s: list[float] = []
    while len(times_s) < MIN_CALLS or sum(times_s) < MIN_TIME_S:
        start_s = clock()
        sample(logits_RV, rows)
        times_s.append(clock() - start_s)
    return times_s


if __name__ == "__main__":
    main()
