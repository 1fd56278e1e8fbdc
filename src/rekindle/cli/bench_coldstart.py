"""`rekindle bench coldstart`: the table, the file and the picture."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rekindle import config
from rekindle.bench.coldstart import ColdStarts, measure_cold_starts, rows
from rekindle.bench.hardware import Hardware, describe
from rekindle.bench.plots import draw_waterfall, require_matplotlib
from rekindle.bench.random_adapters import ALL_LINEAR, RandomAdapters
from rekindle.catalog.catalog import Catalog
from rekindle.cli.bench_lora import model_named
from rekindle.cli.engines import engine_settings
from rekindle.cli.reports import check_writable, say, write_report
from rekindle.cli.settings import Settings, home_directory
from rekindle.cli.tables import print_table
from rekindle.clock import SystemClock
from rekindle.errors import InvalidRequest
from rekindle.store.home import Home
from rekindle.store.storage_profile import profile_of
from rekindle.units import format_bytes
from rekindle.version import VERSION

_RANK = 16


@dataclass(frozen=True, slots=True)
class ColdStartReport:
    """Everything one run found."""

    version: str
    model: str
    hardware: Hardware
    measured: ColdStarts


def measure(arguments: argparse.Namespace) -> int:
    """Measure cold starts of a model of the home, with a random adapter; print, store and draw them."""
    if arguments.plot is not None:
        require_matplotlib()
    if arguments.json is not None:
        check_writable(arguments.json)
    if arguments.repetitions < 1:
        raise InvalidRequest(f"--repetitions must be at least 1, got {arguments.repetitions}", field="repetitions")
    options = config.load(Settings, None, arguments.overrides).engine
    home = Home(home_directory(arguments.home))
    with Catalog.open(home) as catalog, home.using():
        record = model_named(catalog.models(), arguments.model)
        [settings] = engine_settings(options, [record], profile_of(home.root))
        with tempfile.TemporaryDirectory(prefix="rekindle-bench-") as directory:
            adapters = RandomAdapters(Path(directory), record.manifest, record.path)
            adapter = adapters.make(_RANK, ALL_LINEAR, seed=0)
            measured = asyncio.run(measure_cold_starts(settings, adapter, arguments.repetitions, SystemClock(), say))
    report = ColdStartReport(VERSION, record.name, describe(settings.num_threads), measured)
    say("")
    print(
        f"{record.name} in {settings.dtype}: weights of {format_bytes(measured.weights_bytes)}, an adapter of "
        f"{format_bytes(measured.adapter_bytes)}; medians of {arguments.repetitions} in ms"
    )
    print_table(*rows(measured))
    if arguments.json is not None:
        write_report(arguments.json, report)
    if arguments.plot is not None:
        title = f"{record.name}, {settings.dtype}, {settings.num_threads} threads, {report.hardware.cpu}"
        print(f"drawn: {draw_waterfall(measured, title, arguments.plot)}")
    return 0
