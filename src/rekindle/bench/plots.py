"""The results as pictures, one PNG for each measurement. Needs matplotlib, the extra `bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rekindle.bench.coldstart import ColdStarts, waterfall
from rekindle.bench.cost import CostCell
from rekindle.bench.loads import Loads
from rekindle.bench.ranks import RankCell
from rekindle.bench.report import LOADS_GOAL, THRASH_GOAL, Report
from rekindle.bench.thrash import DRAWS, Thrash
from rekindle.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

_DPI = 120
_TOP = 1.1


def require_matplotlib() -> None:
    """Raise ConfigurationError if plots cannot be drawn; to be called before hours of measuring, not after."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ModuleNotFoundError as error:
        raise ConfigurationError("--plot needs matplotlib: pip install 'rekindle[bench]'") from error


def draw_plots(report: Report, directory: Path) -> list[Path]:
    """Write a PNG for each measurement of the report into `directory`; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = []
    if report.cost is not None:
        drawn.append(_draw(directory / "cost.png", report, _cost(report.cost)))
    if report.thrash is not None:
        drawn.append(_draw(directory / "thrash.png", report, _thrash(report.thrash)))
    if report.loads is not None:
        drawn.append(_draw(directory / "loads.png", report, _loads(report.loads)))
    if report.ranks is not None:
        drawn.append(_draw(directory / "ranks.png", report, _ranks(report.ranks)))
    return drawn


def draw_waterfall(measured: ColdStarts, title: str, directory: Path) -> Path:
    """Write a PNG of the parts of cold starts, one after the other; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    return _paint(directory / "coldstart.png", title, _waterfall(measured))


def _draw(path: Path, report: Report, paint: Callable[[Axes], None]) -> Path:
    hardware = report.hardware
    engine = f"{report.model}, {report.engine.dtype}, {report.engine.num_threads} threads"
    return _paint(path, f"{engine}, {hardware.cpu}; {hardware.measured_at}", paint)


def _paint(path: Path, caption: str, paint: Callable[[Axes], None]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    paint(axes)
    axes.grid(alpha=0.3)
    figure.supxlabel(caption, fontsize=7, color="0.4")
    figure.savefig(path, dpi=_DPI)
    return path


def _waterfall(measured: ColdStarts) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        cases = waterfall(measured)
        names = list(dict.fromkeys(name for _, bars in cases for name, _, _ in bars))
        colors = {name: f"C{index}" for index, name in enumerate(names)}
        for row, (_, bars) in enumerate(cases):
            for name, begin_s, length_s in bars:
                axes.barh(row, 1e3 * length_s, left=1e3 * begin_s, color=colors[name], height=0.6)
            _, begin_s, length_s = bars[-1]
            axes.annotate(f" {1e3 * (begin_s + length_s):.0f} ms", (1e3 * (begin_s + length_s), row), va="center")
        for name in names:
            axes.barh(0, 0, color=colors[name], label=name)
        axes.set_yticks(range(len(cases)), [case for case, _ in cases])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set(xlabel="ms from the request", title="From a request to a sleeping model to its first token")
        axes.legend()

    return paint


def _cost(cells: tuple[CostCell, ...]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for concurrency in dict.fromkeys(cell.concurrency for cell in cells):
            mine = [cell for cell in cells if cell.concurrency == concurrency]
            counts = [cell.num_adapters for cell in mine]
            [line] = axes.plot(counts, [1e3 * cell.decode_s for cell in mine], "o-", label=f"C = {concurrency}")
            with_goal = [cell for cell in mine if cell.num_adapters]
            goals_ms = [1e3 * cell.goal_decode_s for cell in with_goal]
            axes.plot([cell.num_adapters for cell in with_goal], goals_ms, "--", marker=".", color=line.get_color())
        axes.plot([], [], "k--", marker=".", label="goal: 1.1 x base + 1.3 x bytes / read rate")
        axes.set_xscale("symlog", base=2, linthresh=1)
        counts = sorted({cell.num_adapters for cell in cells})
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set(
            xlabel="adapters in a batch of C sequences", ylabel="decode step, ms", title="What adapters cost a step"
        )
        axes.set_ylim(bottom=0)
        axes.legend()

    return paint


def _thrash(thrash: Thrash) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for draw in DRAWS:
            mine = [cell for cell in thrash.cells if cell.draw == draw]
            sets = [cell.working_set for cell in mine]
            [line] = axes.plot(sets, [1e3 * cell.ttft_p50_s for cell in mine], "o-", label=f"{draw}, median")
            p99_ms = [1e3 * cell.ttft_p99_s for cell in mine]
            axes.plot(sets, p99_ms, "s:", color=line.get_color(), label=f"{draw}, p99")
        uniform = [cell for cell in thrash.cells if cell.draw == DRAWS[0]]
        goal_ms = 1e3 * THRASH_GOAL * min(uniform, key=lambda cell: cell.working_set).ttft_p50_s
        axes.axhline(goal_ms, color="0.4", ls="--", lw=1, label=f"{THRASH_GOAL:g} x the smallest set's median")
        axes.axvline(1.0, color="0.7", lw=1)
        axes.set_xscale("log", base=2)
        sets = sorted({cell.working_set for cell in thrash.cells})
        axes.set_xticks(sets, [f"{value:g}x" for value in sets])
        axes.set(
            xlabel=f"adapters asked for, over the {thrash.num_resident} that fit",
            ylabel="time to first token, ms",
            title=f"First tokens when adapters do not fit, {thrash.cells[0].rate:.1f} requests a second",
        )
        axes.set_ylim(bottom=0)
        axes.legend()

    return paint


def _loads(loads: Loads) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        for name, gaps_s in (("no load", loads.quiet_itl_s), ("one load a second", loads.loading_itl_s)):
            ordered_ms = sorted(1e3 * gap_s for gap_s in gaps_s)
            shares = [1 - place / len(ordered_ms) for place in range(len(ordered_ms))]
            axes.step(ordered_ms, shares, where="post", label=name)
        goal_ms = 1e3 * LOADS_GOAL * loads.p99_s()[0]
        axes.axhline(0.01, color="0.7", lw=1)
        axes.plot([goal_ms], [0.01], "kv", label=f"goal for the p99: {LOADS_GOAL:g} x that without loads")
        axes.set_yscale("log")
        axes.set(
            xlabel="gap between tokens, ms",
            ylabel="share of gaps at least that long",
            title=f"Streams beside loads of {loads.adapter_bytes / 1e6:.0f} MB ({1e3 * loads.load_s:.0f} ms alone)",
        )
        axes.set_xlim(left=0)
        axes.legend()

    return paint


def _ranks(cells: tuple[RankCell, ...]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        names = [" and ".join(map(str, cell.ranks)) or "base" for cell in cells]
        bars = axes.bar(names, [1e3 * cell.decode_s for cell in cells], width=0.5)
        axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
        for place, cell in enumerate(cells):
            if cell.ranks:
                goal_ms = 1e3 * cell.goal_decode_s
                axes.hlines(goal_ms, place - 0.3, place + 0.3, "k", ls="--", label="goal" if place == 1 else "")
        axes.set(xlabel="ranks in the batch, one sequence each", ylabel="decode step, ms", title="Ranks in one process")
        axes.set_ylim(top=axes.get_ylim()[1] * _TOP)
        axes.legend()

    return paint
