"""Cold starts by their parts: from a request to a model without an engine until its first token.

The same request is sent, in turn, where nothing runs at all; where a template is warm and the weights have to be laid
out, from the page cache or from the disk; where another engine has left them in host memory; and there with an adapter
that no engine has loaded yet. All files are in the page cache but where it says otherwise. HTTP is left out.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.bench.driver import Adapter
from rekindle.bench.load import drop_from_cache, fill_cache
from rekindle.clock import Clock
from rekindle.fleet.host_memory import HostMemoryNode
from rekindle.fleet.launch import TemplateLauncher
from rekindle.fleet.replica import Replica
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.store.model_import import WEIGHTS_NAME

NOTHING, TEMPLATE, DISK = "nothing", "template", "template; weights on disk only"
SHARED, ADAPTER = "template, weights", "the same; adapter asked for"
CASES = (NOTHING, TEMPLATE, DISK, SHARED, ADAPTER)
"""What is there already."""
FIRST_TOKEN = "first token"
PROMPT_TOKENS = 32
_KEPT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds of each part, in order; what the engine's own parts leave of the whole is before and after them."""

    parts_s: tuple[tuple[str, float], ...]

    @property
    def total_s(self) -> float:
        return sum(duration_s for _, duration_s in self.parts_s)


@dataclass(frozen=True, slots=True)
class ColdStarts:
    """All starts of each case; `weights_bytes` and `adapter_bytes` are what they bring."""

    weights_bytes: int
    adapter_bytes: int
    starts: dict[str, tuple[Start, ...]]

    def medians(self) -> Iterator[tuple[str, tuple[tuple[str, float], ...], float]]:
        """Of each case: the median of each part, and of the whole."""
        for case, starts in self.starts.items():
            names = [name for name, _ in starts[0].parts_s]
            by_part = zip(*(start.parts_s for start in starts), strict=True)
            parts = tuple(
                (name, statistics.median(duration_s for _, duration_s in part))
                for name, part in zip(names, by_part, strict=True)
            )
            yield case, parts, statistics.median(start.total_s for start in starts)


async def measure_cold_starts(
    settings: EngineSettings, adapter: Adapter, repetitions: int, clock: Clock, say: Callable[[str], None]
) -> ColdStarts:
    """`repetitions` rounds of all cases."""
    found: dict[str, list[Start]] = {case: [] for case in CASES}
    for repetition in range(repetitions):
        say(f"cold starts: round {repetition + 1} of {repetitions}")
        node = HostMemoryNode(_KEPT_BYTES)
        launcher = TemplateLauncher(node=node)
        try:
            for case in CASES:
                if case in (TEMPLATE, DISK):
                    await node.close()  # the weights of the start before go with it
                weights = Path(settings.model_dir) / WEIGHTS_NAME
                if case == DISK:
                    drop_from_cache(weights)
                elif case in (NOTHING, TEMPLATE):
                    fill_cache(weights)
                found[case].append(await _start(settings, launcher, adapter if case == ADAPTER else None, clock))
        finally:
            await launcher.close()
            await node.close()
    _, path = adapter
    starts = {case: tuple(of_case) for case, of_case in found.items()}
    return ColdStarts(settings.model.num_bytes, path.stat().st_size, starts)


async def _start(settings: EngineSettings, launcher: TemplateLauncher, adapter: Adapter | None, clock: Clock) -> Start:
    replica = Replica(settings, clock, launcher=launcher)
    started_s = clock.monotonic_s()
    starting = asyncio.create_task(replica.start())
    await asyncio.sleep(0)
    try:
        if adapter is not None:
            await replica.add_adapter(adapter[0], Path(adapter[1]))
        stream = replica.generate(_request(None if adapter is None else adapter[0].digest))
        await anext(stream)
        ended_s = clock.monotonic_s()
        await stream.aclose()
        await starting
        left_s = ended_s - started_s - sum(duration_s for _, duration_s in replica.last_start_s)
        return Start((*replica.last_start_s, (FIRST_TOKEN, left_s)))
    finally:
        await replica.stop()


def _request(adapter: AdapterDigest | None) -> GenerateRequest:
    return GenerateRequest(
        RequestId("cold"),
        tuple(range(1, PROMPT_TOKENS + 1)),
        SamplingParams(1, seed=0, temperature=0.0),
        adapter=adapter,
    )


def rows(measured: ColdStarts) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table, in milliseconds."""
    medians = list(measured.medians())
    names = [name for name, _ in medians[0][1]]
    header = ("ALREADY THERE", *(name.upper() for name in names), "TOTAL", "SLOWEST")
    return header, [
        (
            case,
            *(_ms(duration_s) for _, duration_s in parts),
            _ms(total_s),
            _ms(max(start.total_s for start in measured.starts[case])),
        )
        for case, parts, total_s in medians
    ]


def _ms(duration_s: float) -> str:
    return f"{1e3 * duration_s:.1f}"


def waterfall(measured: ColdStarts) -> Sequence[tuple[str, Sequence[tuple[str, float, float]]]]:
    """(case, bars) from top to bottom, a bar being (part, begin, length) in seconds."""
    found = []
    for case, parts, _ in measured.medians():
        begin_s, bars = 0.0, []
        for name, duration_s in parts:
            bars.append((name, begin_s, duration_s))
            begin_s += duration_s
        found.append((case, bars))
    return found
