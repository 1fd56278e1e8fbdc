"""`rekindle models`: import, list and remove base models."""

from __future__ import annotations

import argparse
import sys

from rekindle.catalog.catalog import Catalog
from rekindle.cli.removal import print_removal
from rekindle.cli.settings import home_directory
from rekindle.cli.tables import print_table
from rekindle.clock import SystemClock
from rekindle.engine.models.registry import check_model
from rekindle.errors import ConfigurationError, ModelRejected
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.store.storage_probe import PROBE_BYTES, probe_storage
from rekindle.store.storage_profile import keep_profile, kept_profile
from rekindle.units import format_bytes


def add(arguments: argparse.Namespace) -> int:
    """Import a model and give it a name."""
    home = Home(home_directory(arguments.home))
    with Catalog.open(home) as catalog:
        catalog.check_new_name(arguments.name)
        with home.using():
            manifest = import_model(arguments.path, home, progress=_progress if sys.stderr.isatty() else None)
            try:
                check_model(home.model_directory(manifest.digest))
            except ModelRejected:
                catalog.discard(home.model_directory(manifest.digest))  # what no engine can run, no server is using
                raise
            catalog.add_model(arguments.name, manifest)
    if manifest.num_bytes >= PROBE_BYTES:  # where engines read less than that, it makes no difference how
        _measure_storage(home)
    print(
        f"imported {arguments.name}: {manifest.family}, {manifest.num_parameters / 1e6:.0f} M parameters, "
        f"{format_bytes(manifest.num_bytes)}, digest {manifest.digest[:12]}"
    )
    return 0


def list_models(arguments: argparse.Namespace) -> int:
    """Print the imported models."""
    home = Home(home_directory(arguments.home))
    with Catalog.open(home) as catalog:
        models = catalog.models()
    if arguments.names:
        print("\n".join(model.name for model in models))
        return 0
    rows = [
        (
            model.name,
            model.manifest.family,
            f"{model.manifest.num_parameters / 1e6:.0f} M",
            model.manifest.dtype,
            format_bytes(model.manifest.num_bytes),
            str(model.manifest.context_length),
            model.manifest.digest[:12],
        )
        for model in models
    ]
    print_table(("NAME", "FAMILY", "PARAMETERS", "DTYPE", "SIZE", "CONTEXT", "DIGEST"), rows)
    return 0


def remove(arguments: argparse.Namespace) -> int:
    """Forget a model; its files go when no other name and no server uses them."""
    home = Home(home_directory(arguments.home))
    with Catalog.open(home) as catalog:
        record = catalog.remove_model(arguments.name)
        catalog.remove_unreferenced()
    print_removal(arguments.name, record.path)
    return 0


def _measure_storage(home: Home) -> None:
    """Measure the home's filesystem, which takes a second, unless that was done; the import is there in any case."""
    if kept_profile(home.root) is not None:
        return
    try:
        keep_profile(home.root, probe_storage(home.temporary), SystemClock().unix_s())
    except ConfigurationError as error:
        print(f"rekindle: {error}; files are read as is usual", file=sys.stderr)


def _progress(done: int, total: int) -> None:
    share = done / total if total else 1.0
    bar = "#" * round(share * 30)
    print(f"\r[{bar:<30}] {format_bytes(done)} of {format_bytes(total)}", end="", file=sys.stderr, flush=True)
    if done >= total:
        print(file=sys.stderr)
