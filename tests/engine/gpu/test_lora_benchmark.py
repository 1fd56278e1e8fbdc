"""The parts of `benchmarks/gpu/lora.py` that need no GPU."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.adapter_pages import BoundLora

PATH = Path(__file__).parents[3] / "benchmarks" / "gpu" / "lora.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_lora_benchmark", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_both_sides_of_the_benchmark_compute_the_same_update(benchmark: ModuleType, device: torch.device) -> None:
    shape = benchmark.Shape(0, 128, (128, 64))
    case = benchmark.build(shape, [8, 16], 3, 2, device, page_elements=1024)
    assert benchmark.relative_error(case, BoundLora(16), 1) < 1e-2
    before = case.y_TN.clone()
    benchmark.update_grouped(case, BoundLora(), range(2))
    grouped = case.y_TN.clone()
    case.y_TN.copy_(before)
    benchmark.update_torch(case, range(2))
    difference, update = (grouped - case.y_TN).float().norm(), (grouped - before).float().norm()
    assert update > 0 and difference / update < 3e-2


def test_the_floor_counts_weights_and_inputs_once_and_outputs_twice(benchmark: ModuleType) -> None:
    case = benchmark.build(benchmark.Shape(0, 128, (64,)), [8], 3, 1, torch.device("cpu"), page_elements=1024)
    assert case.bytes_moved == 2 * (8 * 128 + 8 * 64 + 3 * 128 + 2 * 3 * 64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_what_it_needs(benchmark: ModuleType) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA GPU"):
        benchmark.main(["--rows", "1", "--groups", "qkv"])
