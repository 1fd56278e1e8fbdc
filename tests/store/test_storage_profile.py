"""The profile kept in a home: when it counts, and when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rekindle.catalog.catalog import Catalog
from rekindle.cli import main, models
from rekindle.errors import ConfigurationError
from rekindle.protocol.storage import StorageProfile
from rekindle.store.home import Home
from rekindle.store.storage_profile import PROFILE_NAME, holds, keep_profile, kept_profile
from rekindle.units import MIB
from support.tiny import make_model

PROFILE = StorageProfile(MIB, 8, 2e9, 9e9)


def test_a_kept_profile_is_found_again_with_its_date(tmp_path: Path) -> None:
    keep_profile(tmp_path, PROFILE, 86_400.7)
    kept = kept_profile(tmp_path)
    assert kept is not None and kept.profile == PROFILE
    assert kept.device == tmp_path.stat().st_dev
    assert kept.measured.isoformat() == "1970-01-02T00:00:00+00:00"
    assert [path.name for path in tmp_path.iterdir()] == [PROFILE_NAME]


def test_a_profile_of_another_filesystem_does_not_count(tmp_path: Path) -> None:
    keep_profile(tmp_path, PROFILE, 0.0)
    path = tmp_path / PROFILE_NAME
    for change in ({"device": 1}, {"filesystem": "another"}):
        path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **change}))
        assert kept_profile(tmp_path) is None
        keep_profile(tmp_path, PROFILE, 0.0)
        assert kept_profile(tmp_path) is not None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"{}", b'{"device": 1', b"\xff\xfe", b"[]",
        b'{"device":"x","filesystem":"ext4","measured":"now","profile":{}}',
    ],
)  # fmt: skip
def test_what_cannot_be_understood_does_not_count_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PROFILE_NAME).write_bytes(content)
    assert kept_profile(tmp_path) is None
    keep_profile(tmp_path, PROFILE, 0.0)
    assert kept_profile(tmp_path) is not None


@pytest.mark.parametrize("change", [{"chunk_bytes": 1 << 50}, {"num_threads": 10**6}, {"chunk_bytes": 4097}])
def test_a_profile_that_no_probe_finds_does_not_count(tmp_path: Path, change: dict[str, Any]) -> None:
    keep_profile(tmp_path, PROFILE, 0.0)
    path = tmp_path / PROFILE_NAME
    stored = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode({**stored, "profile": {**stored["profile"], **change}}))
    assert kept_profile(tmp_path) is None


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / PROFILE_NAME).mkdir()
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        keep_profile(tmp_path, PROFILE, 0.0)
    assert [path.name for path in tmp_path.iterdir()] == [PROFILE_NAME]
    assert kept_profile(tmp_path) is None


def test_only_homes_that_exist_on_the_same_filesystem_hold_a_directory(tmp_path: Path) -> None:
    assert holds(tmp_path, tmp_path)
    assert not holds(tmp_path / "absent", tmp_path)
    assert not holds(tmp_path, Path("/proc"))


def test_the_first_import_of_a_large_model_measures_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama", tmp_path / "source")
    home = tmp_path / "home"
    probed: list[Path] = []

    def probe(directory: Path) -> StorageProfile:
        probed.append(directory)
        return replace(PROFILE, num_threads=len(probed))

    def add(name: str) -> None:
        assert main(["models", "add", str(tmp_path / "source"), "--name", name, "--home", str(home)]) == 0

    monkeypatch.setattr(models, "probe_storage", probe)
    add("small")
    assert probed == []
    monkeypatch.setattr(models, "PROBE_BYTES", 1)
    add("large")
    add("larger")
    assert probed == [home / "tmp"]
    kept = kept_profile(home)
    assert kept is not None and kept.profile.num_threads == 1


def test_a_disk_that_cannot_be_measured_keeps_no_model_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(directory: Path) -> StorageProfile:
        raise ConfigurationError(f"{directory} cannot be measured: it is full")

    make_model("llama", tmp_path / "source")
    monkeypatch.setattr(models, "probe_storage", fail)
    monkeypatch.setattr(models, "PROBE_BYTES", 1)
    assert main(["models", "add", str(tmp_path / "source"), "--name", "m", "--home", str(tmp_path / "home")]) == 0
    assert "it is full" in capsys.readouterr().err
    with Catalog.open(Home(tmp_path / "home")) as catalog:
        assert [model.name for model in catalog.models()] == ["m"]
