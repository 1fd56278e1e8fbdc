"""The cost curve: how long a step takes as a batch holds more adapters."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from rekindle.bench.driver import Adapter, Driver
from rekindle.bench.plan import Bench
from rekindle.protocol.identity import AdapterDigest

PROMPT_TOKENS, NEW_TOKENS = 64, 28
NUM_ROUNDS = 2
BASE_SHARE, READ_SHARE = 1.1, 1.3


@dataclass(frozen=True, slots=True)
class CostCell:
    """One batch: `concurrency` sequences spread evenly over `num_adapters` adapters, of `read_bytes` together. Prefill
    is the time to compute all prompts; a decode step is the median."""

    concurrency: int
    num_adapters: int
    read_bytes: int
    prefill_s: float
    decode_s: float
    base_prefill_s: float
    base_decode_s: float
    goal_decode_s: float

    @property
    def of_goal(self) -> float:
        return self.decode_s / self.goal_decode_s


def goal_s(base_s: float, read_bytes: int, read_bytes_s: float) -> float:
    """What a decode step may take: little more than the base's, and a read of each adapter."""
    return BASE_SHARE * base_s + READ_SHARE * read_bytes / read_bytes_s


def measure_cost(bench: Bench) -> list[CostCell]:
    """All cells in which every adapter has a sequence; the base is measured for each concurrency."""
    choices = bench.choices
    most = min(max(choices.num_adapters), max(choices.concurrency))
    counts = sorted({0, *(count for count in choices.num_adapters if count <= most)})
    ranks = [choices.ranks[i % len(choices.ranks)] for i in range(counts[-1])]
    num_bytes = [bench.adapter_bytes(rank) for rank in ranks]
    kv_pages = bench.kv_pages(max(choices.concurrency), PROMPT_TOKENS + NEW_TOKENS)
    num_pages = bench.pool_pages("the cost curve", num_bytes, kv_pages)
    adapters = bench.make_adapters(ranks, choices.seed)
    cells = []
    with Driver(bench.settings, num_pages, adapters, choices.seed) as driver:
        _run(driver, adapters, max(counts[-1], 1))
        for concurrency in choices.concurrency:
            bench.say(f"cost: {concurrency} sequences")
            fitting = [count for count in counts if count <= concurrency]
            times: dict[int, list[_Run]] = {count: [] for count in fitting}
            for _ in range(NUM_ROUNDS):  # in turn, so that a disturbance does not meet one cell alone
                for count in fitting:
                    times[count].append(_run(driver, adapters[:count], concurrency))
            prefill_s = {count: min(run.prefill_s for run in runs) for count, runs in times.items()}
            decode_s = {
                count: statistics.median(s for run in runs for s in run.steps_s) for count, runs in times.items()
            }
            cells += [
                CostCell(
                    concurrency=concurrency,
                    num_adapters=count,
                    read_bytes=sum(num_bytes[:count]),
                    prefill_s=prefill_s[count],
                    decode_s=decode_s[count],
                    base_prefill_s=prefill_s[0],
                    base_decode_s=decode_s[0],
                    goal_decode_s=goal_s(decode_s[0], sum(num_bytes[:count]), bench.hardware.read_bytes_s),
                )
                for count in fitting
            ]
    return cells


class _Run(NamedTuple):
    """Seconds of all prompts, and of each step in which all sequences decode."""

    prefill_s: float
    steps_s: list[float]


def _run(driver: Driver, adapters: list[Adapter], concurrency: int) -> _Run:
    digests: list[AdapterDigest | None] = [manifest.digest for manifest, _ in adapters]
    digests = digests or [None]
    served = [driver.submit(digests[i % len(digests)], PROMPT_TOKENS, NEW_TOKENS)[1] for i in range(concurrency)]
    started_s = driver.now_s()
    while not all(one.token_s for one in served):
        driver.step()
    prefill_s = driver.now_s() - started_s
    steps_s = []
    while not any(one.is_finished for one in served):
        steps_s.append(driver.step())
    driver.finish()
    return _Run(prefill_s, steps_s)
