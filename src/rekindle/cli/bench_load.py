"""`rekindle bench load`: the choices of one run, its tables and its file."""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rekindle.bench.hardware import describe
from rekindle.bench.load import LoadReport, load_table, measure_size
from rekindle.cli.reports import check_writable, say, write_report
from rekindle.cli.settings import home_directory
from rekindle.cli.tables import print_table
from rekindle.clock import SystemClock
from rekindle.errors import ConfigurationError
from rekindle.store.storage_probe import probe_storage
from rekindle.store.storage_profile import holds, keep_profile
from rekindle.units import format_bytes
from rekindle.version import VERSION

_PACKAGES = ("torch", "safetensors", "fastsafetensors", "runai-model-streamer", "xxhash")


def measure(arguments: argparse.Namespace) -> int:
    """Measure loaders of weights on files made for it; print and store what was found."""
    if arguments.json is not None:
        check_writable(arguments.json)
    hardware = describe(len(os.sched_getaffinity(0)))
    if hardware.load_average > hardware.num_cores / 2:
        print(f"rekindle: other work runs here (load average {hardware.load_average:.1f}); figures will be unsteady")
    try:
        with tempfile.TemporaryDirectory(prefix="rekindle-bench-", dir=arguments.dir) as name:
            directory = Path(name)
            profile = probe_storage(directory)
            home = home_directory(arguments.home)
            if holds(home, directory):
                keep_profile(home, profile, SystemClock().unix_s())
            rate = (
                "takes no direct reads"
                if profile.direct_bytes_s is None
                else f"{profile.direct_bytes_s / 1e9:.2f} GB/s"
            )
            print(
                f"the disk of {directory.parent}: {rate}, with {profile.num_threads} threads that read "
                f"{format_bytes(profile.chunk_bytes)} at once"
            )
            sizes = []
            for num_bytes in arguments.sizes:
                sizes.append(measure_size(directory, num_bytes, arguments.repetitions, profile, say))
                say("")
                table = load_table(sizes[-1])
                print(f"\n{table.title}")
                print_table(table.header, table.rows)
    except OSError as error:
        raise ConfigurationError(
            f"nothing can be measured in {arguments.dir or tempfile.gettempdir()}: {error}"
        ) from error
    if arguments.json is not None:
        report = LoadReport(VERSION, hardware, str(directory.parent), profile, _versions(), tuple(sizes))
        write_report(arguments.json, report)
    return 0


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
