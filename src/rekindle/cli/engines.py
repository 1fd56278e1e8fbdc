"""From what was asked of engines to the settings of each."""

from __future__ import annotations

import os
from pathlib import Path

from rekindle.catalog.records import ModelRecord
from rekindle.cli.settings import EngineOptions, available_memory_bytes
from rekindle.errors import ConfigurationError
from rekindle.protocol.replica import EngineSettings
from rekindle.units import MIB, format_bytes

_BYTES_PER_PARAMETER = {"bfloat16": 2, "float32": 4}
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_MIN_POOL_BYTES = 64 * MIB


def engine_settings(options: EngineOptions, records: list[ModelRecord]) -> list[EngineSettings]:
    """Settings of each base's engine; what memory the weights leave is shared equally among their pools."""
    dtype = _dtype(options.dtype)
    total_bytes = options.memory if options.memory is not None else available_memory_bytes() // 2
    weights_bytes = sum(record.manifest.num_parameters * _BYTES_PER_PARAMETER[dtype] for record in records)
    pool_bytes = (total_bytes - weights_bytes) // len(records)
    if pool_bytes < _MIN_POOL_BYTES:
        raise ConfigurationError(
            f"engine.memory is {format_bytes(total_bytes)} and the weights of {len(records)} models take "
            f"{format_bytes(weights_bytes)}; at least {format_bytes(_MIN_POOL_BYTES)} must be left for each model's "
            "KV cache and adapters: raise it, or serve fewer models"
        )
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
        )
        for record in records
    ]


def _dtype(asked: str) -> str:
    if asked == "auto":
        return "bfloat16" if _cpu_flags() & _BF16_CPU_FLAGS else "float32"
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
