"""The thrash curve: what happens to first tokens as requests ask for more adapters than fit into memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import accumulate

from rekindle.bench.driver import Adapter, Driver, Served
from rekindle.bench.plan import Bench, quantile

NUM_RESIDENT = 8
WORKING_SETS = (0.5, 1.0, 1.5, 2.0, 4.0, 8.0)
DRAWS = ("uniform", "zipf")
PROMPT_TOKENS, NEW_TOKENS = 32, 16
MAX_SEQUENCES = 8
CAPACITY_SHARE = 0.5
_CALIBRATION_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class ThrashCell:
    """Requests at `rate` a second for `working_set` times the adapters that fit beside the KV cache."""

    draw: str
    working_set: float
    num_adapters: int
    rate: float
    num_requests: int
    num_loads: int
    duration_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    itl_p99_s: float

    @property
    def loads_per_s(self) -> float:
        return self.num_loads / self.duration_s


@dataclass(frozen=True, slots=True)
class Thrash:
    """`num_resident` adapters of `adapter_bytes` each fit beside the KV cache of the sequences that may run."""

    rank: int
    num_resident: int
    adapter_bytes: int
    cells: tuple[ThrashCell, ...]

    def of_smallest(self, cell: ThrashCell) -> float:
        """Median time to the first token, over that of the smallest working set with the same draw."""
        smallest = min((other for other in self.cells if other.draw == cell.draw), key=lambda other: other.working_set)
        return cell.ttft_p50_s / smallest.ttft_p50_s


def measure_thrash(bench: Bench) -> Thrash:
    """All working sets under both draws; the adapters' files are in the page cache, as they were just written."""
    choices = bench.choices
    rank = sorted(choices.ranks)[len(choices.ranks) // 2]
    num_bytes = bench.adapter_bytes(rank)
    kv_pages = bench.kv_pages(MAX_SEQUENCES, PROMPT_TOKENS + NEW_TOKENS)
    num_pages = bench.pool_pages("the thrash curve", [num_bytes] * NUM_RESIDENT, kv_pages)
    adapters = bench.make_adapters([rank] * int(NUM_RESIDENT * max(WORKING_SETS)), choices.seed + 10_000)
    settings = replace(bench.settings, max_sequences=MAX_SEQUENCES)
    cells = []
    with Driver(settings, num_pages, adapters, choices.seed) as driver:
        rate = choices.rate or CAPACITY_SHARE * _capacity(driver, adapters[: NUM_RESIDENT // 2])
        for draw in DRAWS:
            for working_set in WORKING_SETS:
                bench.say(f"thrash: {draw} over {working_set:g} times what fits, {rate:.1f} requests a second")
                wanted = adapters[: int(NUM_RESIDENT * working_set)]
                cells.append(_measure(driver, wanted, draw, working_set, rate, bench))
    return Thrash(rank, NUM_RESIDENT, num_bytes, tuple(cells))


def _capacity(driver: Driver, adapters: list[Adapter]) -> float:
    """Requests a second when there are always more; the second of two runs, for the first brings the adapters."""
    for _ in range(2):
        started_s = driver.now_s()
        for i in range(_CALIBRATION_REQUESTS):
            driver.submit(adapters[i % len(adapters)][0].digest, PROMPT_TOKENS, NEW_TOKENS)
        driver.finish()
        rate = _CALIBRATION_REQUESTS / (driver.now_s() - started_s)
    return rate


def _measure(
    driver: Driver, adapters: list[Adapter], draw: str, working_set: float, rate: float, bench: Bench
) -> ThrashCell:
    for manifest, _ in adapters:
        driver.submit(manifest.digest, 1, 1)
        driver.finish()
    chance = random.Random(bench.choices.seed)
    weights = [1.0 / (place + 1) if draw == "zipf" else 1.0 for place in range(len(adapters))]
    due_s = list(accumulate(chance.expovariate(rate) for _ in range(max(2, round(rate * bench.choices.seconds)))))
    wanted = chance.choices(adapters, weights, k=len(due_s))
    loads_before, started_s = driver.engine.stats().adapter_loads_total, driver.now_s()
    served = _open_loop(driver, [(started_s + at_s, adapter) for at_s, adapter in zip(due_s, wanted, strict=True)])
    ttft_s = [one.ttft_s for one in served]
    return ThrashCell(
        draw=draw,
        working_set=working_set,
        num_adapters=len(adapters),
        rate=rate,
        num_requests=len(served),
        num_loads=driver.engine.stats().adapter_loads_total - loads_before,
        duration_s=driver.now_s() - started_s,
        ttft_p50_s=quantile(ttft_s, 0.5),
        ttft_p99_s=quantile(ttft_s, 0.99),
        itl_p99_s=quantile([s for one in served for s in one.itl_s], 0.99),
    )


def _open_loop(driver: Driver, arrivals: list[tuple[float, Adapter]]) -> list[Served]:
    """Requests come when they are due, however many are unanswered; one noticed late counts from when it was due."""
    served: list[Served] = []
    while len(served) < len(arrivals) or not all(one.is_finished for one in served):
        while len(served) < len(arrivals) and arrivals[len(served)][0] <= driver.now_s():
            at_s, (manifest, _) = arrivals[len(served)]
            served.append(driver.submit(manifest.digest, PROMPT_TOKENS, NEW_TOKENS, at_s)[1])
        next_s = arrivals[len(served)][0] - driver.now_s() if len(served) < len(arrivals) else 1.0
        driver.step(wait_s=max(0.0, next_s))
    return served
