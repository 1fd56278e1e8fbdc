"""One server for all end-to-end tests, with the demo model and its adapters."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import DEMO_ADAPTERS, GGUF, MODEL, Server, rekindle, start, stop


@pytest.fixture(scope="session")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the demo model and its adapters."""
    if not GGUF.exists():
        pytest.skip("the demo model has not been fetched; `make test` does")
    home = tmp_path_factory.mktemp("home")
    imported = rekindle("models", "add", str(GGUF), "--name", MODEL, home=home)
    assert imported.returncode == 0, imported.stderr
    for adapter in sorted(DEMO_ADAPTERS.iterdir()):
        added = rekindle("adapters", "add", str(adapter), "--name", adapter.name, home=home)
        assert added.returncode == 0, added.stderr
    return home


@pytest.fixture(scope="session")
def server(demo_home: Path) -> Iterator[Server]:
    running = start(demo_home, f'server.adapter_roots=["{DEMO_ADAPTERS}"]', 'engine.memory="1GiB"')
    yield running
    if running.process.poll() is None:
        stop(running)
