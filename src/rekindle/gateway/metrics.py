"""Every metric of a server, declared once: what it counts and in which unit.

Names beginning with `vllm:` mean what vLLM means by them, so that dashboards and routers made for it work unchanged;
what vLLM does not know begins with `rekindle_`. Figures of an engine are read from its last report when they are
scraped; the gateway counts requests, tokens and times itself.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rekindle.clock import Clock
from rekindle.gateway.seams import ServedBase, load_estimates
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.replica import EngineStats, PoolBytes
from rekindle.protocol.tiers import Snapshot

MODEL = "model_name"
FIRST_TOKEN_BUCKETS_S = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
REQUEST_BUCKETS_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)


class GatewayMetrics:
    """The metrics of one server."""

    def __init__(self, bases: Sequence[ServedBase], clock: Clock) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        self.adapters_waiting: Tally[tuple[str, str]] = Tally()
        self.adapters_running: Tally[tuple[str, str]] = Tally()
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS_S
        )
        self.inter_token = self._histogram(
            "vllm:inter_token_latency_seconds", "Between a choice's tokens, after its first.", TOKEN_BUCKETS_S
        )
        self.request_time = self._histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its last token.", REQUEST_BUCKETS_S
        )
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of requests that began.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.request_success = self._counter(
            "vllm:request_success", "Choices that ended, by reason.", (MODEL, "finished_reason")
        )
        self._host_memory: Snapshot | None = None
        self._registry.register(_EngineCollector(bases, self))

    def render(self, host_memory: Snapshot | None = None) -> bytes:
        """All metrics in Prometheus' text format, with those of the host-memory tier as it is now, if there is one."""
        self._host_memory = host_memory
        return generate_latest(self._registry)

    @property
    def host_memory(self) -> Snapshot | None:
        """The tier as `render` was given it."""
        return self._host_memory

    @contextmanager
    def observe(self, model: str, adapter: str | None, num_choices: int) -> Iterator[RequestObserver]:
        """Follow one request of a base model and perhaps an adapter, from now until the context is left."""
        observer = RequestObserver(self, self._clock, model, adapter, num_choices)
        try:
            yield observer
        finally:
            observer.close()

    def now_s(self) -> float:
        return self._clock.unix_s()

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = (MODEL,)) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets_s: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, (MODEL,), buckets=buckets_s, registry=self._registry)


class RequestObserver:
    """Times and counts of one request. Made by `GatewayMetrics.observe`."""

    def __init__(
        self, metrics: GatewayMetrics, clock: Clock, model: str, adapter: str | None, num_choices: int
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._model = model
        self._adapter = (model, adapter) if adapter else None
        self._arrived_s = clock.monotonic_s()
        self._last_s: list[float | None] = [None] * num_choices
        self._num_unfinished = num_choices
        self._answering = False
        self._inter_token = metrics.inter_token.labels(model)
        self._generation_tokens = metrics.generation_tokens.labels(model)
        if self._adapter:
            metrics.adapters_waiting[self._adapter] += 1

    def admitted(self, prompt_tokens: int) -> None:
        """The engine has taken the prompt and answered for the first time."""
        self._metrics.prompt_tokens.labels(self._model).inc(prompt_tokens)

    def tokens_arrived(self, choice: int, num_tokens: int) -> None:
        """A choice got `num_tokens` further tokens, perhaps none."""
        if not num_tokens:
            return
        now_s, last_s = self._clock.monotonic_s(), self._last_s[choice]
        self._generation_tokens.inc(num_tokens)
        if last_s is not None:
            self._inter_token.observe((now_s - last_s) / num_tokens)
        elif not self._answering:
            self._begin_answering(now_s)
        self._last_s[choice] = now_s

    def finished(self, reason: FinishReason) -> None:
        """One choice has ended."""
        self._num_unfinished -= 1
        self._metrics.request_success.labels(self._model, reason.value).inc()

    def close(self) -> None:
        """The request is over, however it went; choices that did not finish count as aborted."""
        if self._num_unfinished:
            aborted = self._metrics.request_success.labels(self._model, FinishReason.ABORT.value)
            aborted.inc(self._num_unfinished)
        if self._answering:
            self._metrics.request_time.labels(self._model).observe(self._clock.monotonic_s() - self._arrived_s)
        if self._adapter:
            _take(self._metrics.adapters_running if self._answering else self._metrics.adapters_waiting, self._adapter)

    def _begin_answering(self, now_s: float) -> None:
        self._answering = True
        self._metrics.first_token.labels(self._model).observe(now_s - self._arrived_s)
        if self._adapter:
            _take(self._metrics.adapters_waiting, self._adapter)
            self._metrics.adapters_running[self._adapter] += 1


class _EngineCollector(Collector):
    """Reads the engines' last reports at each scrape."""

    def __init__(self, bases: Sequence[ServedBase], metrics: GatewayMetrics) -> None:
        self._bases = bases
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        reports = [(base.name, base.replica.stats) for base in self._bases]
        known = [(name, stats) for name, stats in reports if stats is not None]
        yield from _gauges(known)
        yield from _counters(known)
        yield self._pages(known)
        yield _pool_bytes(known)
        yield self._adapters_in_use(known)
        yield _merged(known)
        yield from self._starts()
        yield from _estimates(self._bases)
        if (tier := self._metrics.host_memory) is not None:
            yield from _host_memory(tier)

    def _starts(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("rekindle_engine_ready", "1 while requests are taken and answered.", labels=(MODEL,))
        present = GaugeMetricFamily("rekindle_engine_awake", "1 while there is an engine.", labels=(MODEL,))
        restarts = CounterMetricFamily("rekindle_engine_restarts", "Engines started after one died.", labels=(MODEL,))
        wakes = CounterMetricFamily("rekindle_engine_wakes", "Engines started for a sleeping model.", labels=(MODEL,))
        parts = GaugeMetricFamily(
            "rekindle_engine_start_seconds", "Parts of the engine's latest start.", labels=(MODEL, "part")
        )
        for base in self._bases:
            up.add_metric((base.name,), float(base.replica.is_ready))
            present.add_metric((base.name,), float(base.replica.ready is not None))
            restarts.add_metric((base.name,), base.replica.restarts_total)
            wakes.add_metric((base.name,), base.replica.wakes_total)
            for part, duration_s in base.replica.last_start_s:
                parts.add_metric((base.name, part), duration_s)
        yield from (up, present, restarts, wakes, parts)

    def _pages(self, known: Sequence[tuple[str, EngineStats]]) -> Metric:
        pages = GaugeMetricFamily("rekindle_pages", "Pages of device memory, by use.", labels=(MODEL, "kind"))
        for name, stats in known:
            for kind, count in (
                ("total", stats.pages_total),
                ("free", stats.pages_free),
                ("kv", stats.pages_kv_in_use),
                ("adapter", stats.pages_adapter),
                ("prefix_cache", stats.pages_prefix_cache),
            ):
                pages.add_metric((name, kind), count)
        return pages

    def _adapters_in_use(self, known: Sequence[tuple[str, EngineStats]]) -> Metric:
        """The value is the time of the report, as in vLLM. An adapter needs at least one page and nothing else, so
        the number of pages stands for the number of adapters that may run at once."""
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests; the value is a Unix time in seconds.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        for name, stats in known:
            running, waiting = (
                ",".join(sorted(adapter for model, adapter in tally if model == name))
                for tally in (self._metrics.adapters_running, self._metrics.adapters_waiting)
            )
            info.add_metric((str(stats.pages_total), running, waiting), self._metrics.now_s())
        return info


def _estimates(bases: Sequence[ServedBase]) -> Iterator[Metric]:
    """There are no more stages than `rekindle.policy.load_estimates.MAX_STAGES` a model and side of the connection."""
    labels = (MODEL, "stage")
    loads = "rekindle_load_estimate"
    fixed = GaugeMetricFamily(f"{loads}_fixed_seconds", "What any load is likely to take, by stage.", labels=labels)
    rate = GaugeMetricFamily(f"{loads}_bytes_per_second", "How fast its bytes are likely to come.", labels=labels)
    error = GaugeMetricFamily(f"{loads}_error_ratio", "The median relative error of late predictions.", labels=labels)
    count = CounterMetricFamily(f"{loads}_observations", "Loads that the estimate has learnt from.", labels=labels)
    for base in bases:
        for known in load_estimates(base.replica):
            key = (base.name, known.stage)
            fixed.add_metric(key, known.fixed_s)
            count.add_metric(key, known.num_observations)
            if known.bytes_per_s is not None:
                rate.add_metric(key, known.bytes_per_s)
            if known.error is not None:
                error.add_metric(key, known.error)
    yield from (fixed, rate, error, count)


def _host_memory(tier: Snapshot) -> Iterator[Metric]:
    held = GaugeMetricFamily(
        "rekindle_host_memory_bytes", "Bytes of weights and adapters in host memory, by use, and the budget for idle.",
        labels=("kind",),
    )  # fmt: skip
    in_use = sum(each.kept_bytes for each in tier.objects if each.is_in_use)
    for kind, num_bytes in (("in_use", in_use), ("idle", tier.idle_bytes), ("idle_budget", tier.budget_bytes)):
        held.add_metric((kind,), num_bytes)
    yield held
    for name, count, text in (
        ("rekindle_host_memory_hits", tier.hits_total, "Objects that an engine found in host memory."),
        ("rekindle_host_memory_misses", tier.misses_total, "Objects that an engine had to make."),
        ("rekindle_host_memory_evictions", tier.evictions_total, "Objects dropped because the budget was short."),
        ("rekindle_host_memory_packs", tier.packs_total, "Objects packed because the budget was short."),
        ("rekindle_host_memory_unpacks", tier.unpacks_total, "Objects unpacked for engines that map them."),
        ("rekindle_host_memory_reads", tier.reads_total, "Adapters read again when engines had let go of them."),
    ):
        yield CounterMetricFamily(name, text, value=count)


def _pool_bytes(known: Sequence[tuple[str, EngineStats]]) -> Metric:
    text = "Bytes of the page pool, by use; the kinds sum to the pool."
    family = GaugeMetricFamily("rekindle_pool_bytes", text, labels=(MODEL, "kind"))
    for name, stats in known:
        for kind in fields(PoolBytes):
            family.add_metric((name, kind.name), getattr(stats.pool_bytes, kind.name))
    return family


def _gauges(known: Sequence[tuple[str, EngineStats]]) -> Iterator[Metric]:
    running = GaugeMetricFamily("vllm:num_requests_running", "Sequences in the batch.", labels=(MODEL,))
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Sequences that wait to be scheduled.", labels=(MODEL,))
    kv_use = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Pages in use for KV, from 0 to 1.", labels=(MODEL,))
    resident = GaugeMetricFamily("rekindle_adapters_resident", "Adapters in device memory.", labels=(MODEL,))
    loading = GaugeMetricFamily("rekindle_adapter_loads_under_way", "Adapters being loaded.", labels=(MODEL,))
    for name, stats in known:
        running.add_metric((name,), stats.num_running)
        waiting.add_metric((name,), stats.num_waiting)
        kv_use.add_metric((name,), stats.pages_kv_in_use / max(1, stats.pages_total))
        resident.add_metric((name,), len(stats.resident_adapters))
        loading.add_metric((name,), stats.num_adapter_loads)
    yield from (running, waiting, kv_use, resident, loading)


def _merged(known: Sequence[tuple[str, EngineStats]]) -> Metric:
    merged = GaugeMetricFamily(
        "rekindle_merged_adapter", "1 for the adapter version now merged into the weights.", labels=(MODEL, "version")
    )
    for name, stats in known:
        if stats.merged_adapter is not None:
            merged.add_metric((name, stats.merged_adapter), 1)
    return merged


def _counters(known: Sequence[tuple[str, EngineStats]]) -> Iterator[Metric]:
    for metric, field, text in (
        ("vllm:prefix_cache_queries", "prefix_queries_total", "Prompt tokens looked up in the prefix cache."),
        ("vllm:prefix_cache_hits", "prefix_hits_total", "Prompt tokens found in the prefix cache."),
        ("vllm:num_preemptions", "preemptions_total", "Sequences put back because pages ran out."),
        ("rekindle_adapter_loads", "adapter_loads_total", "Adapters brought into device memory."),
        ("rekindle_adapter_load_seconds", "adapter_load_s_total", "Time in which adapters were being loaded."),
        (
            "rekindle_adapter_queued_seconds",
            "adapter_queued_s_total",
            "Time in which loads waited for those before them.",
        ),
        ("rekindle_adapter_evictions", "adapter_evictions_total", "Adapters evicted to make room."),
        ("rekindle_prefix_evictions", "prefix_evictions_total", "Pages of cached prefixes evicted to make room."),
        ("rekindle_refused_late", "refused_late_total", "Requests that could not have their first token in time."),
        ("rekindle_refused_queue_full", "refused_full_total", "Requests that a full queue turned away."),
        ("rekindle_steps", "steps_total", "Forward passes."),
        ("rekindle_steps_merged", "steps_merged_total", "Forward passes with an adapter merged into the weights."),
    ):
        family = CounterMetricFamily(metric, text, labels=(MODEL,))
        for name, stats in known:
            family.add_metric((name,), getattr(stats, field))
        yield family


def _take(tally: Tally[tuple[str, str]], key: tuple[str, str]) -> None:
    tally[key] -= 1
    if not tally[key]:
        del tally[key]
