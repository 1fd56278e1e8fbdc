"""`rekindle bench codecs`: what it measures and on what. How long things take is not looked at."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from rekindle.bench.codecs import CodecsReport, weights_of
from rekindle.cli import main
from rekindle.store.codecs.registry import probed_codecs
from rekindle.store.safetensors_file import TensorStream, write_tensors

WORKING = [probed.name for probed in probed_codecs() if probed.codec is not None]


def write(path: Path, **tensors: tuple[str, bytes]) -> Path:
    widths = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4}
    write_tensors(
        path,
        [
            TensorStream(name, dtype, (len(content) // widths[dtype],), [content].copy)
            for name, (dtype, content) in tensors.items()
        ],
    )
    return path


def normal_f32(num_elements: int) -> bytes:
    return np.random.default_rng(0).normal(0, 0.02, num_elements).astype("<f4").tobytes()


def test_every_codec_is_measured_on_the_files_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "w.safetensors", a=("F32", normal_f32(50_000)), b=("BF16", normal_f32(20_000)))
    target = tmp_path / "report.json"
    assert main(["bench", "codecs", "--data", str(file), "--size", "1MiB", "--json", str(target)]) == 0
    printed = capsys.readouterr().out
    report = msgspec.convert(json.loads(target.read_text()), CodecsReport)
    bf16, f16, f32 = report.results
    label = f"{tmp_path.name}/w.safetensors"
    assert [(r.dtype, r.source, r.num_bytes) for r in report.results] == [
        ("BF16", label, 80_000),
        ("F16", f"{label} (F32 rounded to F16)", 100_000),
        ("F32", label, 200_000),
    ]
    for result in (bf16, f16, f32):
        assert [figures.codec for figures in result.codecs] == WORKING
        assert all(figures.num_bytes == result.num_bytes for figures in result.codecs)
    assert set(report.unavailable) == {probed.name for probed in probed_codecs()} - set(WORKING)
    for name in (*WORKING, *report.unavailable, "memcpy", "entropy bound"):
        assert name in printed
    best = min(f32.codecs, key=lambda figures: figures.share)
    assert f32.entropy_share < best.share < f32.entropy_share + 0.05


def test_weights_of_an_empty_home_are_drawn_and_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "codecs", "--home", str(tmp_path), "--size", "64KiB"]) == 0
    assert capsys.readouterr().out.count("of synthetic weights, normal with deviation 0.02") == 3


def test_every_tensor_gives_the_same_share(tmp_path: Path) -> None:
    tensors = {name: ("BF16", bytes([index]) * 4000) for index, name in enumerate("abcd", 1)}
    file = write(tmp_path / "w.safetensors", **tensors)
    [weights, *_] = weights_of([("w", file)], 8000)
    assert weights.content == b"".join(bytes([index]) * 2000 for index in (1, 2, 3, 4))


def test_rounding_is_to_nearest_even(tmp_path: Path) -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, -1.0 - 2**-7], "<f4")
    weights, *_ = weights_of([("w", write(tmp_path / "w.safetensors", a=("F32", values.tobytes())))], 10**6)
    assert np.frombuffer(weights.content, "<u2").tolist() == [0x3F80, 0x3F80, 0x3F82, 0xBF81]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--size", "much"], "--size: not a size: 'much'"),
        (["--size", "0"], "--size must be positive"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--json", "/nowhere/report.json"], "cannot be written"),
    ],
)
def test_choices_that_make_no_sense_are_refused(
    options: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "codecs", "--home", str(tmp_path), *options]) != 0
    assert reason in capsys.readouterr().err


def test_files_without_weights_or_that_are_no_safetensors_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "ids.safetensors", a=("I32", bytes(40)))
    assert main(["bench", "codecs", "--data", str(file)]) != 0
    assert "no tensors of BF16, F16, F32" in capsys.readouterr().err
    file.write_bytes(b"abc")
    assert main(["bench", "codecs", "--data", str(file)]) != 0
    assert "is not a safetensors file" in capsys.readouterr().err
    assert main(["bench", "codecs", "--data", str(tmp_path / "absent")]) != 0
    assert "absent" in capsys.readouterr().err
