"""Messages between a replica's supervisor and its engine process, beside those of `generation`."""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.estimates import StageEstimate
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.models import ModelManifest
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Everything an engine process needs to start. `dtype` is "bfloat16" or "float32".

    `device` is "cpu" or a CUDA device as torch names it. `memory_bytes` bounds the page pool, which holds KV cache and
    adapters; 0, on a GPU, is what the weights leave free. `max_step_tokens` bounds one forward pass,
    `max_sequences` the sequences running at once, `max_queued` those waiting. `deterministic` selects batch-invariant
    kernels. `merge_bytes` bounds the copies of weights with an adapter merged into them that a CPU keeps; 0 never makes
    any. `merge_in_place` merges into the weights themselves, which is for a device whose memory they are copied to.
    `deterministic` never merges. `load_estimates` are what an earlier engine of the model has learnt of loads.
    `storage` says how to read from the filesystem that holds the model.
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
    merge_in_place: bool = False
    load_estimates: tuple[StageEstimate, ...] = ()
    storage: StorageProfile = DEFAULT_PROFILE


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
class PoolBytes:
    """Where the bytes of the page pool are: what is held, what is free and what is wasted sum to the pool.

    Adapters are `in_use` while sequences run with them, `idle` when they are kept for the next. A KV page that several
    sequences share counts once. Wasted are the unused tail of an adapter's last page, that of a running sequence's
    last page, and what a page is longer than the keys and values of its tokens.
    """

    adapters_in_use: int
    adapters_loading: int
    adapters_idle: int
    kv_in_use: int
    prefix_cache: int
    free: int
    waste_adapter_tails: int
    waste_kv_tails: int
    waste_padding: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine's load and memory, sent about once a second while anything changes.

    Evictions are those that made room for something else: `prefix_evictions_total` counts pages. `refused_late_total`
    counts requests that could not have their first token in time, `refused_full_total` those a full queue turned away.
    Loads of adapters took `adapter_load_s_total`, after they had waited `adapter_queued_s_total` for those before them;
    `load_estimates` say what further ones are likely to take.
    `merged_adapter` is the adapter that the latest step found in its weights, `steps_merged_total` the number of steps
    that found any.
    """

    num_waiting: int
    num_running: int
    pages_total: int
    pages_free: int
    pages_kv_in_use: int
    pages_adapter: int
    pages_prefix_cache: int
    pool_bytes: PoolBytes
    resident_adapters: tuple[AdapterDigest, ...]
    num_adapter_loads: int
    prompt_tokens_total: int
    generated_tokens_total: int
    prefix_queries_total: int
    prefix_hits_total: int
    preemptions_total: int
    adapter_loads_total: int
    adapter_load_s_total: float
    adapter_evictions_total: int
    prefix_evictions_total: int
    refused_late_total: int
    refused_full_total: int
    steps_total: int
    merged_adapter: AdapterDigest | None = None
    steps_merged_total: int = 0
    adapter_queued_s_total: float = 0.0
    load_estimates: tuple[StageEstimate, ...] = ()
