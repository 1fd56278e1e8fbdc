"""Several processes on one catalog, and processes killed in the middle of a registration."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from rekindle.catalog.catalog import Catalog
from rekindle.protocol.adapters import AdapterManifest
from rekindle.store.adapter_import import MANIFEST_NAME, import_adapter
from rekindle.store.home import Home
from support.adapter_files import AdapterDirectory

REGISTER = """
import json, os, signal, sys
from pathlib import Path
import msgspec
from rekindle.catalog.catalog import Catalog
from rekindle.protocol.models import ModelManifest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home

root, worker, rounds, events_left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

def die_after_some_file_operations(event, arguments):
    global events_left
    if event in ("open", "os.rename", "os.mkdir", "os.utime", "os.rmdir", "os.remove"):
        events_left -= 1
        if events_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

home, source = Home(root / "home"), root / ("adapter" + worker)
base = msgspec.json.decode((root / "base.json").read_bytes(), type=ModelManifest)
config = json.loads((source / "adapter_config.json").read_text())
with Catalog.open(home) as catalog:
    home.model_directory(base.digest).mkdir(exist_ok=True)
    catalog.add_model("base", base)
    sys.addaudithook(die_after_some_file_operations)
    for i in range(rounds):
        config["lora_alpha"] = int(worker) * 10_000 + i + 1
        (source / "adapter_config.json").write_text(json.dumps(config))
        manifest = import_adapter(source, base, root / "base", home)
        catalog.register_adapter("adapter" + worker, "base", manifest, source)
        catalog.register_adapter("shared", "base", manifest, source)
"""


def prepare(root: Path, worker: int) -> None:
    adapter = AdapterDirectory(root / f"adapter{worker}").target("q_proj", "up_proj")
    adapter.write()
    (root / "base.json").write_bytes(msgspec.json.encode(adapter.base))


def start(root: Path, worker: int, rounds: int, *, killed_at: int = 0) -> subprocess.Popen[bytes]:
    """A process that registers one version after another; the `killed_at`-th file operation is its last."""
    command = [sys.executable, "-c", REGISTER, str(root), str(worker), str(rounds), str(killed_at)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment)


def check_complete(catalog: Catalog) -> None:
    """Every row has its files, whole."""
    for adapter in catalog.adapters():
        stored = (adapter.path.parent / MANIFEST_NAME).read_bytes()
        assert msgspec.json.decode(stored, type=AdapterManifest) == adapter.manifest
        assert adapter.path.stat().st_size > adapter.manifest.num_elements * 4
    assert [model.name for model in catalog.models()] == ["base"]


def test_processes_that_open_a_new_home_at_once_and_write_lose_nothing(tmp_path: Path) -> None:
    rounds = 5
    for worker in range(3):
        prepare(tmp_path, worker)
    workers = [start(tmp_path, worker, rounds) for worker in range(3)]
    for process in workers:
        assert process.wait() == 0
    home = Home(tmp_path / "home")
    with Catalog.open(home) as catalog:
        for worker in range(3):
            assert catalog.adapter(f"adapter{worker}").version == rounds
        assert catalog.adapter("shared").version == 3 * rounds
        check_complete(catalog)
        stored = {path.name for path in home.adapters.iterdir()}
        assert len(stored) == 3 * rounds
        current = {adapter.manifest.digest for adapter in catalog.adapters()}
        assert {path.name for path in catalog.remove_unreferenced()} == stored - current
        check_complete(catalog)


@pytest.mark.parametrize("killed_at", [3, 9, 12, 15, 18, 40])
def test_a_process_killed_while_registering_leaves_a_home_that_starts_cleanly(tmp_path: Path, killed_at: int) -> None:
    prepare(tmp_path, 0)
    assert start(tmp_path, 0, 50, killed_at=killed_at).wait() == -signal.SIGKILL
    home = Home(tmp_path / "home")
    assert not list(home.temporary.iterdir())
    with Catalog.open(home) as catalog:
        check_complete(catalog)
        catalog.remove_unreferenced()
        check_complete(catalog)
        assert {path.name for path in home.adapters.iterdir()} == {a.manifest.digest for a in catalog.adapters()}
    assert start(tmp_path, 0, 1).wait() == 0


def test_a_clean_up_never_takes_files_from_under_an_import_that_has_no_name_yet(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    adapter = AdapterDirectory(tmp_path / "adapter").target("q_proj")
    base_dir = adapter.write_base()
    home.model_directory(adapter.base.digest).mkdir()
    with Catalog.open(home) as catalog, ThreadPoolExecutor(1) as cleaner:
        catalog.add_model("base", adapter.base)
        for i in range(20):
            adapter.config["lora_alpha"] = i + 1
            cleaning = cleaner.submit(catalog.remove_unreferenced)
            with home.using():
                manifest = import_adapter(adapter.write(), adapter.base, base_dir, home)
                record = catalog.register_adapter("poet", "base", manifest, adapter.path)
            assert home.adapter_directory(manifest.digest) not in cleaning.result()
            assert record.path.exists()


def test_a_killed_server_does_not_keep_files_for_ever(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    script = (
        "import sys, time; from pathlib import Path; from rekindle.store.home import Home\n"
        "with Home(Path(sys.argv[1])).using(): print('using', flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, "-c", script, str(home.root)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    with server, Catalog.open(home) as catalog:
        assert server.stdout.readline() == "using\n"
        stray = home.adapters / "stray"
        stray.mkdir()
        assert catalog.remove_unreferenced() == []
        server.kill()
        server.wait()
        assert catalog.remove_unreferenced() == [stray]
