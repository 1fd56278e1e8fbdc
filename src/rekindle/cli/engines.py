"""From what was asked of engines to the settings of each."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from rekindle.catalog.records import ModelRecord
from rekindle.cli.settings import EngineOptions, available_memory_bytes
from rekindle.errors import ConfigurationError
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.units import MIB, format_bytes

_BYTES_PER_PARAMETER = {"bfloat16": 2, "float32": 4}
_GPU_DRIVER = Path("/dev/nvidiactl")
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_MIN_POOL_BYTES = 64 * MIB


def engine_settings(
    options: EngineOptions, records: list[ModelRecord], storage: StorageProfile = DEFAULT_PROFILE
) -> list[EngineSettings]:
    """Settings of each base's engine; what memory the weights leave is shared equally among their pools. `storage` is
    the profile of the filesystem that holds the bases."""
    device = _device(options.device)
    dtype = _dtype(options.dtype, device)
    _check_merging(options, device)
    pool_bytes = _pool_bytes(options, device, dtype, records)
    return [
        EngineSettings(
            model_dir=str(record.path),
            model=record.manifest,
            dtype=dtype,
            memory_bytes=pool_bytes,
            page_tokens=options.page_tokens,
            max_step_tokens=options.max_step_tokens,
            max_sequences=options.max_sequences,
            max_queued=options.max_queued,
            num_threads=options.threads or len(os.sched_getaffinity(0)),
            deterministic=options.deterministic,
            device=device,
            merge_bytes=_merge_bytes(options, device, dtype, record),
            merge_in_place=options.merge and device != "cpu",
            storage=storage,
        )
        for record in records
    ]


def _pool_bytes(options: EngineOptions, device: str, dtype: str, records: list[ModelRecord]) -> int:
    """The page pool of each engine; 0 lets a GPU's only engine take what the weights leave free."""
    if device != "cpu" and options.memory is None:
        if len(records) == 1:
            return 0
        raise ConfigurationError(
            f"{len(records)} models are to share {device}: say with engine.memory how many bytes of it they may take"
        )
    total_bytes = options.memory if options.memory is not None else available_memory_bytes() // 2
    weights_bytes = sum(_weights_bytes(record, dtype) for record in records)
    merge_bytes = sum(_merge_bytes(options, device, dtype, record) for record in records)
    pool_bytes = (total_bytes - weights_bytes - merge_bytes) // len(records)
    if pool_bytes < _MIN_POOL_BYTES:
        raise ConfigurationError(
            f"engine.memory is {format_bytes(total_bytes)} and the weights of {len(records)} models take "
            f"{format_bytes(weights_bytes)}; at least {format_bytes(_MIN_POOL_BYTES)} must be left for each model's "
            "KV cache and adapters"
            + (f" beside {format_bytes(merge_bytes)} for copies to merge into" if merge_bytes else "")
            + ": raise it, or serve fewer models"
            + (", or set engine.merge_bytes to less" if merge_bytes else "")
        )
    return pool_bytes


def _check_merging(options: EngineOptions, device: str) -> None:
    if options.deterministic and (options.merge or options.merge_bytes):
        raise ConfigurationError(
            "engine.deterministic never merges, and engine.merge or engine.merge_bytes asks for it; set them or "
            "engine.deterministic to the default"
        )
    if device != "cpu" and options.merge_bytes:
        raise ConfigurationError(
            f"engine.merge_bytes is {format_bytes(options.merge_bytes)} for copies of a CPU's weights, and the engine "
            f"runs on {device}, which merges in place: set engine.merge to true and engine.merge_bytes to 0"
        )


def _merge_bytes(options: EngineOptions, device: str, dtype: str, record: ModelRecord) -> int:
    """What an engine may keep of merged weights beside the base's; by default, one copy of them all."""
    if device == "cpu" and options.merge and not options.merge_bytes:
        return _weights_bytes(record, dtype)
    return options.merge_bytes


def _weights_bytes(record: ModelRecord, dtype: str) -> int:
    return record.manifest.num_parameters * _BYTES_PER_PARAMETER[dtype]


def _device(asked: str) -> str:
    """A GPU is taken without being asked for if there is one, and the kernels' compiler."""
    if asked == "auto":
        return "cuda" if _GPU_DRIVER.exists() and find_spec("triton") is not None else "cpu"
    if asked != "cpu" and not re.fullmatch(r"cuda(:\d+)?", asked):
        raise ConfigurationError(f"engine.device {asked!r} is not supported; choose auto, cpu, cuda or cuda:N")
    return asked


def _dtype(asked: str, device: str) -> str:
    if asked == "auto":
        return "bfloat16" if device != "cpu" or _cpu_flags() & _BF16_CPU_FLAGS else "float32"
    if asked not in _BYTES_PER_PARAMETER:
        raise ConfigurationError(
            f"engine.dtype {asked!r} is not supported; choose auto, {', '.join(_BYTES_PER_PARAMETER)}"
        )
    return asked


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()
