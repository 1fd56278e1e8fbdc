"""What a replica reports of itself: counts that only grow, and where its memory is at the moment."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.memory import PageMemory
from rekindle.engine.scheduler.sequence import Sequence
from rekindle.protocol.replica import EngineStats, PoolBytes


@dataclass(slots=True)
class Totals:
    """Counts since the start. `tokens_looked_up` and `tokens_found` are those of the prefix cache."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    tokens_looked_up: int = 0
    tokens_found: int = 0
    refused_late: int = 0
    refused_full: int = 0


def engine_stats(
    config: SchedulerConfig,
    memory: PageMemory,
    totals: Totals,
    num_waiting: int,
    running: Collection[Sequence],
    leaving: Collection[Sequence],
) -> EngineStats:
    """Load and memory as of now; `running` and `leaving` are the sequences that hold pages."""
    adapters, num_idle = memory.adapters, memory.prefix.num_idle
    num_kv = config.num_pages - memory.pool.num_free - num_idle - adapters.num_pages_used
    return EngineStats(
        num_waiting=num_waiting,
        num_running=len(running),
        pages_total=config.num_pages,
        pages_free=memory.pool.num_free,
        pages_kv_in_use=num_kv,
        pages_adapter=adapters.num_pages_used,
        pages_prefix_cache=num_idle,
        pool_bytes=_pool_bytes(config, memory, num_kv, (*running, *leaving)),
        resident_adapters=adapters.resident,
        num_adapter_loads=adapters.loads.num_under_way,
        prompt_tokens_total=totals.prompt_tokens,
        generated_tokens_total=totals.generated_tokens,
        prefix_queries_total=totals.tokens_looked_up,
        prefix_hits_total=totals.tokens_found,
        preemptions_total=totals.preemptions,
        adapter_loads_total=adapters.loads.num_begun,
        adapter_load_s_total=adapters.loads.load_s_total,
        adapter_evictions_total=memory.num_adapters_evicted,
        prefix_evictions_total=memory.num_prefix_pages_evicted,
        refused_late_total=totals.refused_late,
        refused_full_total=totals.refused_full,
        steps_total=totals.steps,
        adapter_queued_s_total=adapters.loads.queued_s_total,
        load_estimates=adapters.loads.estimates.snapshot(),
    )


def _pool_bytes(
    config: SchedulerConfig, memory: PageMemory, num_kv_pages: int, holders: Collection[Sequence]
) -> PoolBytes:
    payload_bytes = config.page_tokens * config.token_bytes
    num_prefix_pages = memory.prefix.num_idle
    kv_tail_bytes = sum(sequence.num_spare_positions for sequence in holders) * config.token_bytes
    in_use, loading, idle = memory.adapters.bytes_by_use()
    adapter_bytes = memory.adapters.num_pages_used * config.page_bytes
    return PoolBytes(
        adapters_in_use=in_use,
        adapters_loading=loading,
        adapters_idle=idle,
        kv_in_use=num_kv_pages * payload_bytes - kv_tail_bytes,
        prefix_cache=num_prefix_pages * payload_bytes,
        free=memory.pool.num_free * config.page_bytes,
        waste_adapter_tails=adapter_bytes - in_use - loading - idle,
        waste_kv_tails=kv_tail_bytes,
        waste_padding=(num_kv_pages + num_prefix_pages) * (config.page_bytes - payload_bytes),
    )
