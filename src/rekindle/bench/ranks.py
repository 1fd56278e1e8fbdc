"""Ranks far apart in one process: what a sequence's decode step takes with each, and with both in the batch."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rekindle.bench.cost import goal_s
from rekindle.bench.driver import Driver
from rekindle.bench.plan import Bench
from rekindle.protocol.identity import AdapterDigest

RANKS = (8, 256)
PROMPT_TOKENS, NEW_TOKENS = 32, 48


@dataclass(frozen=True, slots=True)
class RankCell:
    """One sequence for each of `ranks`; without any, one of the base. Loads are those of the adapters' first use."""

    ranks: tuple[int, ...]
    read_bytes: int
    load_s: float
    decode_s: float
    goal_decode_s: float


def measure_ranks(bench: Bench) -> list[RankCell]:
    """The base, each rank alone, and all in one batch, in an engine that starts without knowing the later ones."""
    num_bytes = [bench.adapter_bytes(rank) for rank in RANKS]
    num_pages = bench.pool_pages("the ranks", num_bytes, bench.kv_pages(4, PROMPT_TOKENS + NEW_TOKENS))
    adapters = bench.make_adapters(RANKS, bench.choices.seed + 20_000)
    bench.say("ranks: " + " and ".join(map(str, RANKS)))
    with Driver(bench.settings, num_pages, [], bench.choices.seed) as driver:
        _decode_s(driver, [None])
        one_s, two_s = _decode_s(driver, [None]), _decode_s(driver, [None, None])
        read_bytes_s = bench.hardware.read_bytes_s
        cells = [RankCell((), 0, 0.0, one_s, goal_s(one_s, 0, read_bytes_s))]
        for rank, adapter, size in zip(RANKS, adapters, num_bytes, strict=True):
            driver.add(adapter)
            load_s = driver.time_load(adapter[0].digest)
            decode_s = _decode_s(driver, [adapter[0].digest])
            cells.append(RankCell((rank,), size, load_s, decode_s, goal_s(one_s, size, read_bytes_s)))
        decode_s = _decode_s(driver, [manifest.digest for manifest, _ in adapters])
        cells.append(RankCell(RANKS, sum(num_bytes), 0.0, decode_s, goal_s(two_s, sum(num_bytes), read_bytes_s)))
    return cells


def _decode_s(driver: Driver, adapters: list[AdapterDigest | None]) -> float:
    """Median of the steps in which all sequences decode."""
    served = [driver.submit(adapter, PROMPT_TOKENS, NEW_TOKENS)[1] for adapter in adapters]
    while not all(one.token_s for one in served):
        driver.step()
    steps_s = []
    while not any(one.is_finished for one in served):
        steps_s.append(driver.step())
    driver.finish()
    return statistics.median(steps_s)
