"""The part of `benchmarks/gpu/whole_engine.py` that merges, on a small model and on whatever device there is."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rekindle.engine import engine as engine_module
from rekindle.engine.devices import CudaDevice
from rekindle.units import MIB
from support.devices import PagedDevice, RerunRecorder

PATH = Path(__file__).parents[3] / "benchmarks" / "gpu" / "whole_engine.py"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("whole_engine_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(engine_module, "MergePolicy", engine_module.MergePolicy)  # which the benchmark replaces
    monkeypatch.setattr(module, "MERGED_CONCURRENCIES", (1, 3))
    num_threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(num_threads)


def test_the_merged_adapter_is_measured_against_the_base_and_against_itself_beside_the_weights(
    benchmark: ModuleType, device: torch.device
) -> None:
    recorder = RerunRecorder()
    on = CudaDevice("cuda") if device.type == "cuda" else PagedDevice(recorder=recorder)
    cells = benchmark.bench_merged(on, CONFIG, 4 * MIB, new_tokens=8)
    names = ["against merged: base", "against merged: beside", "against merged: merged"]
    assert [(cell.system, cell.concurrency) for cell in cells] == [(name, c) for c in (1, 3) for name in names]
    assert all(cell.step_ms > 0 for cell in cells)
    assert [cell.allowed_ms is None for cell in cells] == [True, True, False] * 2
    assert device.type == "cuda" or any(recording.num_replays for recording in recorder.recordings)


def test_an_adapter_that_is_not_merged_is_not_reported_as_merged(
    benchmark: ModuleType, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = CudaDevice("cuda") if device.type == "cuda" else PagedDevice()
    monkeypatch.setattr(benchmark.SwitchedPolicy, "choose", lambda *_: benchmark.MergeChoice())
    with pytest.raises(RuntimeError, match="was not merged in every step"):
        benchmark.bench_merged(on, CONFIG, 4 * MIB, new_tokens=8)
