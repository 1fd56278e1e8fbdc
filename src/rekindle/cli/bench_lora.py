"""`rekindle bench lora`: the choices of one run, its tables, its file and its pictures."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from rekindle import config
from rekindle.bench.cost import measure_cost
from rekindle.bench.hardware import describe
from rekindle.bench.loads import measure_loads
from rekindle.bench.plan import Bench, Choices
from rekindle.bench.plots import draw_plots, require_matplotlib
from rekindle.bench.random_adapters import ALL_LINEAR, ATTENTION, RandomAdapters
from rekindle.bench.ranks import measure_ranks
from rekindle.bench.report import EngineChoices, Report, tables
from rekindle.bench.thrash import measure_thrash
from rekindle.catalog.catalog import Catalog
from rekindle.catalog.records import ModelRecord
from rekindle.cli.bench_output import check_writable, say
from rekindle.cli.engines import engine_settings
from rekindle.cli.settings import Settings, home_directory
from rekindle.cli.tables import print_table
from rekindle.errors import ConfigurationError, InvalidRequest
from rekindle.protocol.replica import EngineSettings
from rekindle.store.home import Home
from rekindle.version import VERSION

_TARGET_SETS = {"attention": ATTENTION, "all-linear": ALL_LINEAR}


def measure(arguments: argparse.Namespace) -> int:
    """Measure what adapters cost an engine, on a model of the home with random adapters; print, store and draw it."""
    if arguments.plot is not None:
        require_matplotlib()
    if arguments.json is not None:
        check_writable(arguments.json)
    choices = _choices(arguments)
    engine = config.load(Settings, None, arguments.overrides).engine
    home = Home(home_directory(arguments.home))
    with Catalog.open(home) as catalog, home.using():
        record = _model(catalog.models(), arguments.model)
        [settings] = engine_settings(engine, [record])
        with tempfile.TemporaryDirectory(prefix="rekindle-bench-") as directory:
            adapters = RandomAdapters(Path(directory), record.manifest, record.path)
            adapters.num_elements(1, choices.targets)  # refuses targets that the model lacks, before anything is made
            report = _measure(record, settings, adapters, choices, arguments.only)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(msgspec.to_builtins(report), indent=1) + "\n")
        print(f"written: {arguments.json}")
    if arguments.plot is not None:
        for path in draw_plots(report, arguments.plot):
            print(f"drawn: {path}")
    return 0


def _measure(
    record: ModelRecord, settings: EngineSettings, adapters: RandomAdapters, choices: Choices, only: Sequence[str]
) -> Report:
    """Every measurement asked for; its table is printed as soon as it is there."""
    hardware = describe(settings.num_threads)
    report = Report(
        version=VERSION,
        model=record.name,
        model_digest=record.manifest.digest,
        hardware=hardware,
        engine=EngineChoices(
            settings.dtype, settings.page_tokens, settings.max_step_tokens, settings.num_threads, settings.deterministic
        ),
        choices=choices,
    )
    if hardware.load_average > settings.num_threads / 2:
        print(f"rekindle: other work runs here (load average {hardware.load_average:.1f}); figures will be unsteady")
    print(
        f"{record.name} in {settings.dtype} on {settings.num_threads} threads of {hardware.cpu}, which read "
        f"{hardware.read_bytes_s / 1e9:.1f} GB/s"
    )
    bench = Bench(settings, adapters, hardware, choices, settings.memory_bytes, say)
    for name, measured in (
        ("cost", lambda: {"cost": tuple(measure_cost(bench))}),
        ("thrash", lambda: {"thrash": measure_thrash(bench)}),
        ("loads", lambda: {"loads": measure_loads(bench)}),
        ("ranks", lambda: {"ranks": tuple(measure_ranks(bench))}),
    ):
        if name in only:
            report = replace(report, **measured())
            say("")
            table = tables(report)[-1]
            print(f"\n{table.title}")
            print_table(table.header, table.rows)
    return report


def _choices(arguments: argparse.Namespace) -> Choices:
    targets = [part for name in arguments.targets for part in _TARGET_SETS.get(name, (name,))]
    return Choices(
        num_adapters=tuple(arguments.adapters),
        concurrency=tuple(arguments.concurrency),
        ranks=tuple(arguments.ranks),
        targets=tuple(dict.fromkeys(targets)),
        seconds=arguments.seconds,
        rate=arguments.rate,
        seed=arguments.seed,
    )


def _model(records: list[ModelRecord], name: str | None) -> ModelRecord:
    known = ", ".join(record.name for record in records)
    if name is None and len(records) == 1:
        return records[0]
    for record in records:
        if record.name == name:
            return record
    if not records:
        raise ConfigurationError("no model has been imported; run `rekindle models add PATH --name NAME` first")
    raise InvalidRequest(f"name the model with --model; imported: {known}", field="model")
