"""`rekindle bench load`: that all loaders load the same, cold and warm. How long they take is not looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from rekindle.bench import load
from rekindle.bench.load import drop_from_cache, load_table, measure_size
from rekindle.bench.loaders import Loaded, Loader, loaders_of, same, touch
from rekindle.bench.weight_files import WeightFiles, tensor_shapes, weight_files
from rekindle.cli import main
from rekindle.errors import ConfigurationError, InternalError
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.store.reading import resident_share
from rekindle.store.storage_profile import kept_profile

pytest.importorskip("safetensors")

SIZE = 300_000
OURS = ["rekindle", "rekindle, verified", "rekindle, into used memory"]
OTHERS = ["torch.load", "torch.load, mmap", "safetensors load_file", "safetensors safe_open"]


@pytest.mark.parametrize("num_bytes", [2, 3, 4096, 1_000_001, 10**9, 10**11])
def test_the_files_tensors_fill_their_size_and_look_like_a_models(num_bytes: int) -> None:
    shapes = tensor_shapes(num_bytes)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == num_bytes // 2
    assert all(0 not in shape for shape in shapes.values())
    widths = {shape[-1] for name, shape in shapes.items() if name.endswith("q_proj.weight")}
    assert len(widths) <= 2  # of the last, what is left may be less than a row
    assert max(widths, default=64) <= 4096


def test_every_loader_gives_the_same_tensors(tmp_path: Path) -> None:
    with weight_files(tmp_path, SIZE) as files:
        loaders = loaders_of(files, DEFAULT_PROFILE)
        assert [loader.name for loader in loaders][:5] == OURS + OTHERS[:2]
        assert {loader.name for loader in loaders} >= {*OURS, *OTHERS}
        first = loaders[0].load().tensors
        assert len(first) == files.num_tensors
        for loader in loaders:
            loaded = loader.load()
            assert same(loaded.tensors, first), loader.name
            assert touch(loaded.tensors) == touch(first) > 0
            loaded.close()
    assert list(tmp_path.iterdir()) == []


def test_a_loader_that_gives_other_bytes_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_wrong_one(files: WeightFiles, profile: StorageProfile) -> list[Loader]:
        right = loaders_of(files, profile)[0]

        def load() -> Loaded:
            tensors = dict(right.load().tensors)
            list(tensors.values())[-1].view(-1).view(torch.int16)[0] ^= 1
            return Loaded(tensors)

        return [right, replace(right, name="wrong", load=load)]

    monkeypatch.setattr(load, "loaders_of", with_a_wrong_one)
    with pytest.raises(InternalError, match="wrong and rekindle loaded different tensors"):
        measure_size(tmp_path, SIZE, 1, DEFAULT_PROFILE)


def test_cold_loads_find_nothing_in_the_page_cache_and_warm_ones_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(8192))
    drop_from_cache(probe)
    if resident_share(probe):
        pytest.skip("files cannot be dropped from the page cache here")
    probe.unlink()
    shares: list[float] = []

    def recording(files: WeightFiles, profile: StorageProfile) -> list[Loader]:
        [found, *_] = loaders_of(files, profile)

        def recorded() -> Loaded:
            shares.append(resident_share(found.path))
            return found.load()

        return [replace(found, load=recorded)]

    monkeypatch.setattr(load, "loaders_of", recording)
    measure_size(tmp_path, SIZE, 2, DEFAULT_PROFILE)
    assert shares[1:] == [0, 1, 0, 1]


def test_a_table_tells_how_others_compare_with_ours_and_ours_with_the_disk(tmp_path: Path) -> None:
    size = measure_size(tmp_path, SIZE, 1, DEFAULT_PROFILE)
    ours, *_, other = size.loaders
    size = replace(
        size,
        num_bytes=2_000_000,
        probe_s=(0.001,),
        loaders=(replace(ours, cold_s=(0.002,), warm_s=(0.004,)), replace(other, cold_s=(0.005,), warm_s=(0.001,))),
    )
    first, second = load_table(size).rows
    assert first == ("rekindle", "2.0", "1.00", "1.00", "0.50", "4.0", "0.50", "1.00")
    assert second[1:] == ("5.0", "0.40", "2.50", "0.20", "1.0", "2.00", "0.25")


def test_the_command_writes_what_it_found_and_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, directory = tmp_path / "report.json", tmp_path / "disk"
    directory.mkdir()
    arguments = ["--sizes", "100kB,0.3MB", "--repetitions", "2", "--dir", str(directory), "--json", str(path)]
    assert main(["bench", "load", *arguments, "--home", str(tmp_path)]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["directory"] == str(directory)
    assert report["hardware"]["cpu"]
    kept = kept_profile(tmp_path)
    assert kept is not None and msgspec.to_builtins(kept.profile) == report["profile"]
    assert report["versions"]["torch"]
    assert [size["num_tensors"] for size in report["sizes"]] == [len(tensor_shapes(n)) for n in (100_000, 300_000)]
    for size in report["sizes"]:
        assert len(size["probe_s"]) == 2
        assert all(len(times["cold_s"]) == len(times["warm_s"]) == 2 for times in size["loaders"])
    assert list(directory.iterdir()) == []
    printed = capsys.readouterr().out
    assert all(name in printed for name in OURS + OTHERS)


@pytest.mark.parametrize("wrong", [["--sizes", "1XB"], ["--sizes", "1"], ["--repetitions", "0"]])
def test_nonsense_is_refused_before_anything_is_written(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "load", *wrong])
    assert caught.value.code == 2


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="need twice that"), weight_files(tmp_path, 10**18):
        pass
