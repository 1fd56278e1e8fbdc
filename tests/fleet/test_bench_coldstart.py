"""`rekindle bench coldstart`, whole, on a tiny model."""

import json
import os
from pathlib import Path

import pytest

from rekindle.bench.coldstart import CASES, ColdStarts, Start, rows, waterfall
from rekindle.cli.main import main
from support.tiny import make_model


def test_the_parts_of_every_start_are_measured_and_none_is_left_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model("llama", tmp_path / "source")
    home = ["--home", str(tmp_path / "home")]
    assert main(["models", "add", str(tmp_path / "source"), "--name", "tiny", *home]) == 0
    report = tmp_path / "report.json"
    before = _children()
    assert main(["bench", "coldstart", "--repetitions", "2", "--json", str(report), *home]) == 0
    assert _children() <= before
    measured = json.loads(report.read_text())["measured"]
    assert list(measured["starts"]) == list(CASES)
    for starts in measured["starts"].values():
        assert len(starts) == 2
        for start in starts:
            names = [name for name, _ in start["parts_s"]]
            assert names == ["process", "imports", "kernels", "weights", "pool", "first token"]
            assert all(duration_s >= 0 for _, duration_s in start["parts_s"])
    shown = capsys.readouterr().out
    assert all(case in shown for case in CASES)


def _children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


def test_the_table_and_the_picture_show_medians() -> None:
    starts = tuple(Start((("process", a), ("first token", b))) for a, b in ((0.1, 0.4), (0.2, 0.5), (0.3, 9.0)))
    measured = ColdStarts(100, 10, {"one": starts})
    assert rows(measured)[1] == [("one", "200.0", "500.0", "700.0", "9300.0")]
    assert waterfall(measured) == [("one", [("process", 0.0, 0.2), ("first token", 0.2, 0.5)])]


@pytest.mark.parametrize("repetitions", ["0", "-1"])
def test_no_rounds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], repetitions: str) -> None:
    assert main(["bench", "coldstart", "--repetitions", repetitions, "--home", str(tmp_path)]) == 1
    assert "--repetitions must be at least 1" in capsys.readouterr().err
