"""`rekindle models` and `rekindle adapters`: what they leave in the home."""

from __future__ import annotations

from pathlib import Path

import pytest

from rekindle.catalog.catalog import Catalog
from rekindle.cli import main
from rekindle.store.home import Home
from support.adapter_files import AdapterDirectory


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def adapter(home: Home, tmp_path: Path) -> AdapterDirectory:
    """An adapter whose base is in the home."""
    adapter = AdapterDirectory(tmp_path / "adapter").target("q_proj")
    adapter.write_base().rename(home.model_directory(adapter.base.digest))
    with Catalog.open(home) as catalog:
        catalog.add_model("base", adapter.base)
    return adapter


def run(home: Home, *arguments: str) -> None:
    assert main([*arguments, "--home", str(home.root)]) == 0


def add(home: Home, adapter: AdapterDirectory, alpha: int = 8) -> None:
    adapter.config["lora_alpha"] = alpha
    run(home, "adapters", "add", str(adapter.write()), "--name", "poet")


def test_removing_names_frees_the_disk_at_once(
    home: Home, adapter: AdapterDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    for alpha in (1, 2, 3):
        add(home, adapter, alpha)
    assert len(list(home.adapters.iterdir())) == 3
    run(home, "adapters", "rm", "poet")
    assert list(home.adapters.iterdir()) == []
    assert capsys.readouterr().out.endswith("removed poet\n")
    run(home, "models", "rm", "base")
    assert list(home.models.iterdir()) == []
    assert list(home.temporary.iterdir()) == []


def test_removing_names_under_a_running_server_leaves_its_files_and_says_so(
    home: Home, adapter: AdapterDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    add(home, adapter)
    with home.using():
        run(home, "adapters", "rm", "poet")
        run(home, "models", "rm", "base")
    said = capsys.readouterr().out
    assert "removed poet; its files stay while" in said
    assert "removed base; its files stay while" in said
    assert len(list(home.adapters.iterdir())) == len(list(home.models.iterdir())) == 1


def test_a_model_that_is_rejected_leaves_no_files(
    home: Home, adapter: AdapterDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["models", "add", str(tmp_path / "empty"), "--name", "new", "--home", str(home.root)]) == 1
    assert "has no config.json" in capsys.readouterr().err
    assert [path.name for path in home.models.iterdir()] == [adapter.base.digest]
