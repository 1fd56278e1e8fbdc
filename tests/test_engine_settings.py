"""What the settings of a server come to for each of its engines."""

from pathlib import Path

import pytest

from rekindle.catalog.records import ModelRecord
from rekindle.cli import engines
from rekindle.cli.settings import EngineOptions
from rekindle.errors import ConfigurationError
from rekindle.units import GIB
from support.replicas import MODEL


def record(name: str) -> ModelRecord:
    return ModelRecord(name, MODEL, Path("/models") / name, 0)


def test_a_gpu_is_taken_where_there_is_a_driver_and_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    monkeypatch.setattr(engines, "_GPU_DRIVER", driver)
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    assert engines.engine_settings(EngineOptions(memory=GIB), [record("a")])[0].device == "cpu"
    driver.touch()
    (on_gpu,) = engines.engine_settings(EngineOptions(), [record("a")])
    assert (on_gpu.device, on_gpu.dtype, on_gpu.memory_bytes) == ("cuda", "bfloat16", 0)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engines.engine_settings(EngineOptions(memory=GIB), [record("a")])[0].device == "cpu"


def test_models_that_share_a_gpu_need_a_budget() -> None:
    records = [record("a"), record("b")]
    with pytest.raises(ConfigurationError, match=r"2 models are to share cuda:1.*engine\.memory"):
        engines.engine_settings(EngineOptions(device="cuda:1"), records)
    settings = engines.engine_settings(EngineOptions(device="cuda:1", memory=GIB), records)
    assert [it.memory_bytes for it in settings] == [settings[0].memory_bytes] * 2
    assert 0 < settings[0].memory_bytes <= GIB // 2


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "CPU", "cuda:x", "cuda:1 "])
def test_unknown_devices_are_refused_by_name(asked: str) -> None:
    with pytest.raises(ConfigurationError, match=r"engine\.device .* choose auto, cpu, cuda or cuda:N"):
        engines.engine_settings(EngineOptions(device=asked), [record("a")])


def test_a_deterministic_engine_is_not_given_memory_to_merge_in() -> None:
    for asked in ({"merge_bytes": GIB}, {"merge": True}):
        options = EngineOptions(device="cpu", memory=4 * GIB, deterministic=True, **asked)
        with pytest.raises(ConfigurationError, match=r"engine\.deterministic never merges.*merge_bytes"):
            engines.engine_settings(options, [record("a")])


def test_one_setting_merges_on_every_device() -> None:
    (on_cpu,) = engines.engine_settings(EngineOptions(device="cpu", memory=4 * GIB, merge=True), [record("a")])
    (without,) = engines.engine_settings(EngineOptions(device="cpu", memory=4 * GIB), [record("a")])
    assert not on_cpu.merge_in_place
    assert on_cpu.merge_bytes > 0
    assert on_cpu.memory_bytes == without.memory_bytes - on_cpu.merge_bytes
    assert (without.merge_bytes, without.merge_in_place) == (0, False)
    (on_gpu,) = engines.engine_settings(EngineOptions(device="cuda", merge=True), [record("a")])
    assert (on_gpu.merge_bytes, on_gpu.merge_in_place) == (0, True)


def test_a_gpu_is_not_given_memory_to_merge_in() -> None:
    with pytest.raises(ConfigurationError, match=r"engine\.merge_bytes is 1.*set engine\.merge to true"):
        engines.engine_settings(EngineOptions(device="cuda", merge_bytes=GIB), [record("a")])
