"""`rekindle bench codecs`: where the weights come from, the tables and the file."""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rekindle.bench.codecs import HEADER, CodecsReport, measure_weights, rows, weights_of
from rekindle.bench.hardware import describe
from rekindle.catalog.catalog import Catalog
from rekindle.cli.reports import check_writable, say, write_report
from rekindle.cli.settings import home_directory
from rekindle.cli.tables import print_table
from rekindle.errors import InvalidRequest
from rekindle.store.codecs.registry import probed_codecs
from rekindle.store.home import Home
from rekindle.store.model_import import WEIGHTS_NAME
from rekindle.units import format_bytes, parse_bytes
from rekindle.version import VERSION

_DEQUANTISED_AS = "BF16"
"""What quantised models are stored in. They pack far better than trained weights do, and the catalog does not say which
models were quantised, so none of this dtype is measured unasked."""


def measure(arguments: argparse.Namespace) -> int:
    """Measure what each codec makes of weights, on this machine; print and store it."""
    if arguments.json is not None:
        check_writable(arguments.json)
    num_bytes = _size(arguments.size)
    num_threads = len(os.sched_getaffinity(0)) if arguments.threads is None else arguments.threads
    if num_threads < 1:
        raise InvalidRequest(f"--threads must be at least 1, got {num_threads}", field="threads")
    if arguments.data:
        report = _measure(
            [(f"{path.parent.name}/{path.name}", path) for path in arguments.data], num_bytes, num_threads
        )
    else:
        home = Home(home_directory(arguments.home))
        with Catalog.open(home) as catalog, home.using():
            report = _measure(_imported(catalog), num_bytes, num_threads)
    if arguments.json is not None:
        write_report(arguments.json, report)
    return 0


def _measure(files: list[tuple[str, Path]], num_bytes: int, num_threads: int) -> CodecsReport:
    hardware = describe(num_threads)
    if hardware.load_average > num_threads / 2:
        print(f"rekindle: other work runs here (load average {hardware.load_average:.1f}); figures will be unsteady")
    print(f"{num_threads} threads of {hardware.cpu}; rates are of unpacked bytes")
    results = []
    with ThreadPoolExecutor(num_threads) as threads:
        for weights in weights_of(files, num_bytes):
            results.append(measure_weights(weights, threads, say))
            say("")
            print(f"\n{weights.dtype}: {format_bytes(len(weights.content))} of {weights.source}")
            print_table(HEADER, rows(results[-1]))
    unavailable = {probed.name: probed.reason for probed in probed_codecs() if probed.codec is None}
    print()
    for name, reason in unavailable.items():
        print(f"not measured: {name}: {reason}")
    return CodecsReport(VERSION, hardware, num_threads, tuple(results), unavailable)


def _imported(catalog: Catalog) -> list[tuple[str, Path]]:
    """The home's adapters, and its models that cannot have been quantised."""
    adapters = [(f"adapter {record.name}", record.path) for record in catalog.adapters()]
    models = [
        (f"model {record.name}", record.path / WEIGHTS_NAME)
        for record in catalog.models()
        if record.manifest.dtype != _DEQUANTISED_AS
    ]
    return [*adapters, *models]


def _size(text: str) -> int:
    try:
        num_bytes = parse_bytes(text)
    except ValueError as error:
        raise InvalidRequest(f"--size: {error}", field="size") from error
    if num_bytes < 1:
        raise InvalidRequest(f"--size must be positive, got {text}", field="size")
    return num_bytes
