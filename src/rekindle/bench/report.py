"""The results of one run, as tables for people and as one record for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.bench.cost import CostCell
from rekindle.bench.hardware import Hardware
from rekindle.bench.loads import EVERY_S, NUM_STREAMS, Loads
from rekindle.bench.plan import Choices, quantile
from rekindle.bench.ranks import RankCell
from rekindle.bench.thrash import Thrash
from rekindle.units import format_bytes

THRASH_GOAL, LOADS_GOAL = 1.5, 1.25


@dataclass(frozen=True, slots=True)
class EngineChoices:
    """The engine's settings that figures depend on."""

    dtype: str
    page_tokens: int
    max_step_tokens: int
    num_threads: int
    deterministic: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run found; what was not measured is None."""

    version: str
    model: str
    model_digest: str
    hardware: Hardware
    engine: EngineChoices
    choices: Choices
    cost: tuple[CostCell, ...] | None = None
    thrash: Thrash | None = None
    loads: Loads | None = None
    ranks: tuple[RankCell, ...] | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """A title, a header and rows of text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(report: Report) -> list[Table]:
    """What to print, in the order of measurement."""
    found = []
    if report.cost is not None:
        found.append(_cost_table(report.cost))
    if report.thrash is not None:
        found.append(_thrash_table(report.thrash))
    if report.loads is not None:
        found.append(_loads_table(report.loads))
    if report.ranks is not None:
        found.append(_ranks_table(report.ranks))
    return found


def _cost_table(cells: Sequence[CostCell]) -> Table:
    header = ("C", "ADAPTERS", "BYTES", "PREFILL ms", "OF BASE", "DECODE ms", "OF BASE", "GOAL ms", "OF GOAL")
    rows = [
        (
            str(cell.concurrency), str(cell.num_adapters), format_bytes(cell.read_bytes),
            _ms(cell.prefill_s), _ratio(cell.prefill_s / cell.base_prefill_s),
            _ms(cell.decode_s), _ratio(cell.decode_s / cell.base_decode_s),
            _ms(cell.goal_decode_s) if cell.num_adapters else "",
            _ratio(cell.of_goal) if cell.num_adapters else "",
        )
        for cell in cells
    ]  # fmt: skip
    return Table("Cost: a batch of C sequences; goal 1.1 x base + 1.3 x bytes / read rate", header, tuple(rows))


def _thrash_table(thrash: Thrash) -> Table:
    header = ("DRAW", "SET", "ADAPTERS", "REQUESTS", "LOADS/s", "TTFT p50", "TTFT p99", "ITL p99", "OF SMALLEST")
    rows = [
        (
            cell.draw, f"{cell.working_set:g}x", str(cell.num_adapters), str(cell.num_requests),
            f"{cell.loads_per_s:.1f}", _ms(cell.ttft_p50_s), _ms(cell.ttft_p99_s), _ms(cell.itl_p99_s),
            _ratio(thrash.of_smallest(cell)),
        )
        for cell in thrash.cells
    ]  # fmt: skip
    title = (
        f"Thrash: {thrash.num_resident} adapters of rank {thrash.rank}, {format_bytes(thrash.adapter_bytes)} each, "
        "fit; "
        f"{thrash.cells[0].rate:.1f} requests a second; times in ms; goal at 2x: {THRASH_GOAL:g} of the smallest"
    )
    return Table(title, header, tuple(rows))


def _loads_table(loads: Loads) -> Table:
    rows = [
        (num_loads, str(len(gaps)), _ms(quantile(gaps, 0.5)), _ms(quantile(gaps, 0.99)), _ms(max(gaps)), of_quiet)
        for num_loads, gaps, of_quiet in (
            ("0", loads.quiet_itl_s, ""),
            (str(loads.num_loads), loads.loading_itl_s, _ratio(loads.ratio)),
        )
    ]
    title = (
        f"A load every {EVERY_S:g} s beside {NUM_STREAMS} streams: rank {loads.rank}, "
        f"{format_bytes(loads.adapter_bytes)}, {_ms(loads.load_s)} ms alone; gaps between tokens in ms; "
        f"goal {LOADS_GOAL:g} of the p99 without"
    )
    return Table(title, ("LOADS", "GAPS", "p50", "p99", "MOST", "p99 OF QUIET"), tuple(rows))


def _ranks_table(cells: Sequence[RankCell]) -> Table:
    rows = [
        (
            " and ".join(map(str, cell.ranks)) or "base", format_bytes(cell.read_bytes),
            _ms(cell.load_s) if cell.load_s else "", _ms(cell.decode_s),
            _ms(cell.goal_decode_s) if cell.ranks else "",
            _ratio(cell.decode_s / cell.goal_decode_s) if cell.ranks else "",
        )
        for cell in cells
    ]  # fmt: skip
    header = ("RANK", "BYTES", "LOAD ms", "DECODE ms", "GOAL ms", "OF GOAL")
    return Table("Ranks in one process: one sequence for each", header, tuple(rows))


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}"
