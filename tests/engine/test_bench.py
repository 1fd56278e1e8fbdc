"""`rekindle bench lora` on a tiny model: that it measures what it says. How long things take is not looked at."""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rekindle.bench import loads, plots, thrash
from rekindle.bench.report import Report
from rekindle.catalog.catalog import Catalog
from rekindle.cli import main
from rekindle.units import MIB
from support.tiny_home import TinyHome

pytest.importorskip("transformers")

WORKING_SETS = (0.5, 2.0, 8.0)
QUICK = ["--adapters", "0", "1", "3", "--concurrency", "1", "3", "--ranks", "4", "8", "--seconds", "1", "--rate", "40"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    tiny = TinyHome(tmp_path_factory.mktemp("bench"))
    with Catalog.open(tiny.home) as catalog:
        catalog.add_model("tiny", tiny.manifest)
    return tiny


@pytest.fixture(scope="module")
def report(tiny: TinyHome, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("report") / "report.json"
    arguments = ["bench", "lora", "--home", str(tiny.home.root), *QUICK, "--json", str(path)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loads, "MAX_BYTES", 8 * MIB)
        patched.setattr(loads, "FIRST_RANK", 64)
        patched.setattr(thrash, "WORKING_SETS", WORKING_SETS)
        assert main([*arguments, "--set", "engine.threads=1", "--set", "engine.dtype=float32"]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def bench(tiny: TinyHome, *arguments: str) -> int:
    return main(["bench", "lora", "--home", str(tiny.home.root), *arguments])


def test_the_report_says_on_what_and_how_it_was_measured(report: dict[str, Any]) -> None:
    assert report["hardware"]["num_threads"] == report["engine"]["num_threads"] == 1
    assert report["hardware"]["read_bytes_s"] > 0
    assert report["hardware"]["cpu"]
    assert (report["model"], report["engine"]["dtype"]) == ("tiny", "float32")
    assert report["choices"]["ranks"] == [4, 8]


def test_the_cost_curve_has_every_batch_in_which_each_adapter_has_a_sequence(report: dict[str, Any]) -> None:
    cells = report["cost"]
    assert [(cell["concurrency"], cell["num_adapters"]) for cell in cells] == [(1, 0), (1, 1), (3, 0), (3, 1), (3, 3)]
    read_rate = report["hardware"]["read_bytes_s"]
    for cell in cells:
        goal_s = 1.1 * cell["base_decode_s"] + 1.3 * cell["read_bytes"] / read_rate
        assert cell["goal_decode_s"] == pytest.approx(goal_s)
        assert cell["prefill_s"] > cell["decode_s"] / cell["concurrency"] > 0
    sizes = {cell["num_adapters"]: cell["read_bytes"] for cell in cells}
    elements_a_rank = 3 * ((48 + 96) + 2 * (48 + 32) + (96 + 48))
    assert sizes[0] == 0
    assert 4 * 4 * elements_a_rank <= sizes[1] < 1.3 * 4 * 4 * elements_a_rank
    assert sizes[3] == pytest.approx(4 * sizes[1], rel=0.3), "ranks 4, 8 and 4"


def test_adapters_that_fit_are_seldom_loaded_again_and_those_that_do_not_often(report: dict[str, Any]) -> None:
    found = report["thrash"]
    by_set = {(cell["draw"], cell["working_set"]): cell for cell in found["cells"]}
    assert set(by_set) == {(draw, size) for draw in thrash.DRAWS for size in WORKING_SETS}
    for draw in thrash.DRAWS:
        # What is evicted goes by value, so that a page of a prefix may now and then cost an adapter its place.
        assert by_set[draw, 0.5]["num_loads"] < by_set[draw, 8.0]["num_loads"] / 2
        assert by_set[draw, 8.0]["num_loads"] > 0
    assert by_set["uniform", 8.0]["num_loads"] > by_set["zipf", 8.0]["num_loads"]
    for cell in found["cells"]:
        assert cell["num_requests"] == 40
        assert cell["num_adapters"] == found["num_resident"] * cell["working_set"]
        assert 0 < cell["ttft_p50_s"] <= cell["ttft_p99_s"]


def test_streams_are_measured_with_loads_and_without(report: dict[str, Any]) -> None:
    found = report["loads"]
    assert found["num_loads"] == 2, "one at the beginning of each spell of half a second"
    assert len(found["quiet_itl_s"]) > 10
    assert len(found["loading_itl_s"]) > 10
    assert found["rank"] >= 64
    assert found["load_s"] > 0


def test_ranks_far_apart_are_measured_in_one_process(report: dict[str, Any]) -> None:
    base, small, large, both = report["ranks"]
    assert [cell["ranks"] for cell in (base, small, large, both)] == [[], [8], [256], [8, 256]]
    assert large["read_bytes"] >= 30 * small["read_bytes"]
    assert both["read_bytes"] == large["read_bytes"] + small["read_bytes"]


def test_only_what_is_asked_for_is_measured(tiny: TinyHome, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tiny, "--only", "cost", *QUICK) == 0
    printed = capsys.readouterr().out
    assert "Cost:" in printed
    assert "Thrash:" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nobody"], "name the model with --model; imported: tiny"),
        (["--targets", "w_pack"], "the model has no w_pack; its modules are"),
        (["--ranks", "0"], "--ranks takes numbers of at least 1, got (0,)"),
        (["--seconds", "0"], "--seconds must lie in [1, 3600], got 0"),
        (["--json", "/nonexistent/report.json"], "--json /nonexistent/report.json cannot be written"),
        (["--ranks", "20000", "--set", "engine.memory=70MiB"], "ask for fewer adapters or smaller ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_remedy(
    tiny: TinyHome, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert bench(tiny, *arguments) == 1
    assert words in capsys.readouterr().err


def test_pictures_without_matplotlib_are_refused_before_anything_is_measured(
    tiny: TinyHome, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench(tiny, "--plot", str(tmp_path)) == 1
    assert "pip install 'rekindle[bench]'" in capsys.readouterr().err


def test_a_picture_of_each_measurement_is_drawn(tiny: TinyHome, report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = plots.draw_plots(msgspec.convert(report, Report), tmp_path / "plots")
    assert [path.name for path in drawn] == ["cost.png", "thrash.png", "loads.png", "ranks.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
