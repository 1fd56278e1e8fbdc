"""Loads beside the work: what a large adapter's arrival does to streams that are under way.

The adapter is as large as makes a load take about `AIM_LOAD_S`, and is only loaded, never run: the request that asks
for it is withdrawn once its load has begun. There is one more of them than fit, so that one is always absent.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rekindle.bench.driver import Adapter, Driver, Served
from rekindle.bench.plan import Bench, quantile
from rekindle.bench.random_adapters import ALL_LINEAR
from rekindle.protocol.identity import RequestId
from rekindle.units import MIB

NUM_STREAMS = 4
PROMPT_TOKENS, MAX_NEW_TOKENS = 32, 1536
AIM_LOAD_S, EVERY_S = 0.2, 1.0
FIRST_RANK = 256
MAX_BYTES = 2048 * MIB


@dataclass(frozen=True, slots=True)
class Loads:
    """Gaps between tokens of `NUM_STREAMS` streams, in two spells of the same length; `load_s` is one load alone."""

    rank: int
    adapter_bytes: int
    load_s: float
    num_loads: int
    quiet_itl_s: tuple[float, ...]
    loading_itl_s: tuple[float, ...]

    def p99_s(self) -> tuple[float, float]:
        """Without loads and with them."""
        return quantile(self.quiet_itl_s, 0.99), quantile(self.loading_itl_s, 0.99)

    @property
    def ratio(self) -> float:
        quiet_s, loading_s = self.p99_s()
        return loading_s / quiet_s


def measure_loads(bench: Bench) -> Loads:
    """A quiet spell, one with loads, and both again."""
    num_tokens = min(MAX_NEW_TOKENS, bench.settings.model.context_length - PROMPT_TOKENS)
    kv_pages = bench.kv_pages(NUM_STREAMS + 1, PROMPT_TOKENS + num_tokens)

    def drive(rank: int) -> tuple[Driver, list[Adapter]]:
        num_bytes = bench.adapter_bytes(rank, ALL_LINEAR)
        num_pages = bench.pool_pages("a load beside the work", [num_bytes], kv_pages)
        num_fitting = num_pages // bench.pages_of(num_bytes)
        adapters = bench.make_adapters([rank] * (num_fitting + 1), bench.choices.seed + 30_000, ALL_LINEAR)
        return Driver(bench.settings, num_pages, adapters, bench.choices.seed), adapters

    driver, adapters = drive(FIRST_RANK)
    with driver:
        bytes_of_one_rank = bench.adapter_bytes(FIRST_RANK, ALL_LINEAR) / FIRST_RANK
        s_of_one_rank = _load_s(driver, adapters) / FIRST_RANK
    rank = max(FIRST_RANK, round(min(AIM_LOAD_S / s_of_one_rank, MAX_BYTES / bytes_of_one_rank)))
    driver, adapters = drive(rank)
    with driver:
        load_s = _load_s(driver, adapters)
        loads_before = driver.engine.stats().adapter_loads_total
        quiet: list[float] = []
        loading: list[float] = []
        for spell in range(4):
            bench.say(f"loads: {NUM_STREAMS} streams, {'one load a second' if spell % 2 else 'no load'}")
            gaps_s = _stream(driver, num_tokens, bench.choices.seconds / 2, adapters if spell % 2 else [])
            (loading if spell % 2 else quiet).extend(gaps_s)
        num_loads = driver.engine.stats().adapter_loads_total - loads_before
    return Loads(rank, bench.adapter_bytes(rank, ALL_LINEAR), load_s, num_loads, tuple(quiet), tuple(loading))


def _load_s(driver: Driver, adapters: list[Adapter]) -> float:
    """Median of loads into pages that have been written before."""
    durations_s = [driver.time_load(driver.absent(adapters)) for _ in range(3 * len(adapters))]
    return statistics.median(durations_s[len(adapters) :])


def _stream(driver: Driver, num_tokens: int, seconds: float, adapters: list[Adapter]) -> list[float]:
    """Gaps between the tokens of streams that are begun anew when they end, with a load a second of one of these
    adapters; nothing is left running."""

    def begin() -> tuple[RequestId, Served]:
        return driver.submit(None, PROMPT_TOKENS, num_tokens)

    streams = [begin() for _ in range(NUM_STREAMS)]
    while not all(served.token_s for _, served in streams):
        driver.step()
    ended: list[Served] = []
    started_s = driver.now_s()
    num_loads = 0
    while (passed_s := driver.now_s() - started_s) < seconds:
        if adapters and passed_s >= num_loads * EVERY_S:
            name, _ = driver.submit(driver.absent(adapters), 1, 1)
            driver.step()
            driver.abort(name)
            num_loads += 1
        driver.step()
        ended += [served for _, served in streams if served.is_finished]
        streams = [begin() if stream[1].is_finished else stream for stream in streams]
    for name, _ in streams:
        driver.abort(name)
    driver.step(wait_s=0)
    return [gap_s for served in (*ended, *(served for _, served in streams)) for gap_s in served.itl_s]
