"""`rekindle adapters`: register, list and remove LoRA adapters."""

from __future__ import annotations

import argparse

from rekindle.catalog.catalog import Catalog
from rekindle.cli.removal import print_removal
from rekindle.cli.settings import home_directory
from rekindle.cli.tables import print_table
from rekindle.errors import InvalidRequest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.safetensors_file import DTYPE_BYTES
from rekindle.units import format_bytes


def add(arguments: argparse.Namespace) -> int:
    """Import an adapter and give it a name, or a new version to a name that exists."""
    home = Home(home_directory(arguments.home))
    with Catalog.open(home) as catalog, home.using():
        base = catalog.model(arguments.base or _only_base(catalog))
        base_directory = home.model_directory(base.manifest.digest)
        manifest = import_adapter(arguments.path, base.manifest, base_directory, home)
        catalog.register_adapter(arguments.name, base.name, manifest, str(arguments.path))
    ranks = ", ".join(map(str, manifest.ranks))
    print(
        f"registered {arguments.name} for {base.name}: rank {ranks} on {', '.join(manifest.targets)}, "
        f"{len(manifest.bindings)} matrices bound, version {manifest.digest[:12]}"
    )
    return 0


def list_adapters(arguments: argparse.Namespace) -> int:
    """Print the registered adapters."""
    with Catalog.open(Home(home_directory(arguments.home))) as catalog:
        adapters = catalog.adapters()
    if arguments.names:
        print("\n".join(adapter.name for adapter in adapters))
        return 0
    rows = [
        (
            adapter.name,
            adapter.base_name,
            ", ".join(map(str, adapter.manifest.ranks)),
            " ".join(adapter.manifest.targets),
            format_bytes(adapter.manifest.num_elements * DTYPE_BYTES[adapter.manifest.dtype]),
            adapter.manifest.digest[:12],
        )
        for adapter in adapters
    ]
    print_table(("NAME", "BASE", "RANK", "TARGETS", "SIZE", "VERSION"), rows)
    return 0


def remove(arguments: argparse.Namespace) -> int:
    """Forget an adapter; its files go when no other name and no server uses them."""
    with Catalog.open(Home(home_directory(arguments.home))) as catalog:
        record = catalog.remove_adapter(arguments.name)
        catalog.remove_unreferenced()
    print_removal(arguments.name, record.path)
    return 0


def _only_base(catalog: Catalog) -> str:
    names = [model.name for model in catalog.models()]
    if len(names) != 1:
        known = ", ".join(names) or "none; import one with `rekindle models add`"
        raise InvalidRequest(f"name the base model with --base; imported: {known}", field="base")
    return names[0]
