"""Messages between a replica's supervisor and its engine process, beside those of `generation`."""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.models import ModelManifest


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything an engine process needs to start. `dtype` is "bfloat16" or "float32".

    `device` is "cpu" or a CUDA device as torch names it. `memory_bytes` bounds the page pool, which holds KV cache and
    adapters; 0, on a GPU, is what the weights leave free. `max_step_tokens` bounds one forward pass,
    `max_sequences` the sequences running at once, `max_queued` those waiting. `deterministic` selects batch-invariant
    kernels. `merge_bytes` bounds the weights kept beside the base's with an adapter merged into them; 0 never merges,
    nor does `deterministic`.
    """

    model_dir: str
    model: ModelManifest
    dtype: str
    memory_bytes: int
    page_tokens: int
    max_step_tokens: int
    max_sequences: int
    max_queued: int
    num_threads: int
    deterministic: bool = False
    device: str = "cpu"
    merge_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineReady:
    """The engine accepts requests. `parts_s` are the timed parts of its start, in order."""

    num_pages: int
    page_bytes: int
    page_tokens: int
    max_context_tokens: int
    parts_s: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class EngineFatal:
    """The engine cannot go on and exits. `is_configuration`: starting it again the same way cannot help."""

    message: str
    is_configuration: bool


@dataclass(frozen=True, slots=True)
class AddAdapter:
    """Make a version known to the engine; its bytes are read when first needed. `path` is the stored file."""

    manifest: AdapterManifest
    path: str


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    """Forget a version once no running sequence uses it."""

    digest: AdapterDigest


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish nothing more; exit."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's load and memory, sent about once a second while anything changes. `merged_adapter` is
    the adapter that the latest step found in its weights, `steps_merged_total` the number of steps that found any."""

    num_waiting: int
    num_running: int
    pages_total: int
    pages_free: int
    pages_kv_in_use: int
    pages_adapter: int
    pages_prefix_cache: int
    resident_adapters: tuple[AdapterDigest, ...]
    prompt_tokens_total: int
    generated_tokens_total: int
    prefix_queries_total: int
    prefix_hits_total: int
    preemptions_total: int
    adapter_loads_total: int
    steps_total: int
    merged_adapter: AdapterDigest | None = None
    steps_merged_total: int = 0
