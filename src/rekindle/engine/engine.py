"""One replica on one device: the scheduler, the runner and the adapters' memory, joined.

`step` is the whole loop body: take in finished adapter loads, plan, act, commit. Everything here belongs to one thread.
When the last sequence has ended, the page accounts are checked; an error in them ends the engine, because what it would
go on to compute cannot be trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from rekindle.clock import Clock
from rekindle.engine.adapter_sources import AdapterSources
from rekindle.engine.adapters import AdapterMemory, ResidentAdapter
from rekindle.engine.arena import OWN_ARENA, Arena, ArenaMismatch, SharedArena
from rekindle.engine.devices import Device, device_of
from rekindle.engine.graphs import DecodeGraphs, GraphSizes, Recorder
from rekindle.engine.kernels.interface import Kernels, KVPool
from rekindle.engine.lora_times import LoraTimer
from rekindle.engine.memory import page_bytes_for, token_bytes_for
from rekindle.engine.merging import MergedCopies, Merging, adapter_size
from rekindle.engine.merging_in_place import InPlaceMerge, own_linears
from rekindle.engine.models.architecture import Architecture
from rekindle.engine.models.decoder import Decoder
from rekindle.engine.models.registry import read_architecture, read_config
from rekindle.engine.runner import Runner
from rekindle.engine.scheduler.merging import MergePolicy, mix_of
from rekindle.engine.scheduler.plan import StepPlan
from rekindle.engine.scheduler.scheduler import Scheduler, SchedulerConfig
from rekindle.engine.weights import Weights, WeightSource
from rekindle.errors import ConfigurationError, InvalidRequest
from rekindle.policy.load_estimates import LoadEstimates
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineReady, EngineSettings, EngineStats
from rekindle.store.model_layout import tensor_shapes
from rekindle.store.tier_client import TierClient
from rekindle.units import MIB, format_bytes

_logger = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
CHECK_INTERVAL_S = 10.0
"""How far apart checks of the page accounts are at least: each takes time in proportion to the pool."""
_MIN_PAGES = 4
_ARENA_MARGIN_BYTES = 64 * MIB


class Engine:
    """See the module. `wake` is called from another thread when there may be something new to run. `device` and
    `weights` stand in for those that the settings name. With a `tier`, weights that were laid out anew are shared.

    Raises:
        ConfigurationError: the memory budget does not hold a usable pool, or a setting is out of range.
        ModelRejected: the model's files do not match its configuration.
    """

    def __init__(
        self,
        settings: EngineSettings,
        clock: Clock,
        wake: Callable[[], None],
        device: Device | None = None,
        weights: WeightSource | None = None,
        tier: TierClient | None = None,
    ) -> None:
        started_s = clock.monotonic_s()
        device = device or device_of(settings)
        torch.set_num_threads(settings.num_threads)
        torch.set_grad_enabled(False)
        dtype = _dtype(settings)
        directory = Path(settings.model_dir)
        config = read_config(directory)
        arch = read_architecture(config)
        context_tokens = settings.model.context_length
        weights = weights or Weights(
            directory / "model.safetensors", dtype, tensor_shapes(config), device.torch_device, settings.storage
        )
        opened_s = clock.monotonic_s()
        kernels = device.kernels(set(arch.attention), deterministic=settings.deterministic)
        kernels_s = clock.monotonic_s() - opened_s
        timer = device.lora_timer(arch.num_layers, clock) if _merges(settings) else None
        model = _decoder(settings, arch, weights, kernels, clock, timer, tier)
        weights.release_pages()
        loaded_s = clock.monotonic_s()

        shape = arch.attention[0]
        page_bytes = page_bytes_for(shape, arch.num_layers, settings.page_tokens, dtype)
        pool_bytes = device.pool_bytes(settings.memory_bytes)
        num_pages = pool_bytes // page_bytes
        _check_pool(num_pages, page_bytes, pool_bytes)
        self._memory = device.memory(num_pages, page_bytes, dtype)
        sources = AdapterSources(self._memory.pace, clock, tier, settings.storage.direct_bytes_s)
        self._adapters = AdapterMemory(self._memory, sources, arch.num_layers, wake, clock)
        kv = self._memory.kv(shape, arch.num_layers, settings.page_tokens)
        graphs = _graphs(settings, model, kv, self._memory.pool_PX, device.recorder())
        self._merging, self._merge_policy = _merging(
            settings, model, weights, self._adapters.find, loaded_s - started_s, clock
        )
        self._runner = Runner(model, kv, self._adapters, self._memory.pool_PX, graphs, self._merging)
        self._arch, self._element_bytes = arch, dtype.itemsize
        self._vocab_size = arch.vocab_size
        self._answers: list[TokenChunk] = []
        self._clock = clock
        self._is_checked = True
        self._next_check_s = clock.monotonic_s()
        self._scheduler = Scheduler(
            SchedulerConfig(
                base=settings.model.digest,
                num_pages=num_pages,
                page_tokens=settings.page_tokens,
                page_bytes=page_bytes,
                token_bytes=token_bytes_for(shape, arch.num_layers, dtype),
                element_bytes=dtype.itemsize,
                max_step_tokens=settings.max_step_tokens,
                max_sequences=settings.max_sequences,
                max_queued=settings.max_queued,
                max_context_tokens=context_tokens,
            ),
            self._merge_policy,
            LoadEstimates.guessed(settings.load_estimates),
        )
        self.ready = EngineReady(
            num_pages=num_pages,
            page_bytes=page_bytes,
            page_tokens=settings.page_tokens,
            max_context_tokens=context_tokens,
            parts_s=(
                ("kernels", kernels_s),
                ("weights", loaded_s - started_s - kernels_s),
                ("pool", clock.monotonic_s() - loaded_s),
            ),
        )

    @property
    def has_runnable(self) -> bool:
        """Whether `step` may have something to do or to say."""
        return bool(self._answers) or self._scheduler.has_runnable or self._adapters.has_finished

    @property
    def next_deadline_s(self) -> float | None:
        """When `step` is to be called though nothing is runnable, by the engine's clock; None if nothing is due."""
        return self._scheduler.next_deadline_s

    def add_adapter(self, manifest: AdapterManifest, path: str) -> None:
        """Make a version known; its bytes are read when a request first needs them."""
        self._scheduler.add_adapter(manifest, path)
        if self._merge_policy is not None:
            self._merge_policy.add(manifest.digest, adapter_size(manifest, self._arch, self._element_bytes))

    def remove_adapter(self, digest: AdapterDigest) -> None:
        """Forget a version once no sequence uses it."""
        self._scheduler.remove_adapter(digest)
        if self._merging is not None and self._merge_policy is not None:
            self._merge_policy.remove(digest)
            self._merging.forget(digest)

    def submit(self, request: GenerateRequest) -> None:
        """Queue a sequence.

        Raises:
            InvalidRequest: it can never run here: a token is not in the vocabulary, or it is too long.
            NotFound: its adapter is unknown.
            Overloaded: the queue is full.
        """
        self._check_vocabulary(request.prompt_token_ids, "prompt")
        self._check_vocabulary([token_id for token_id, _ in request.sampling.logit_bias], "logit_bias")
        self._answers += self._scheduler.submit(request, self._clock.monotonic_s())
        self._is_checked = False

    def abort(self, request_id: RequestId) -> None:
        """Stop a sequence; unknown ids are ignored."""
        self._answers += self._scheduler.abort(request_id)

    def step(self) -> list[TokenChunk]:
        """Run one step if there is something to run; returns what sequences gained since the last call.

        Raises:
            InternalError: the page accounts do not agree, as is found when the engine becomes idle.
        """
        chunks, self._answers = self._answers, []
        self._runner.between_steps()  # what the step before gave is on its way by now
        now_s = self._clock.monotonic_s()
        for outcome in self._adapters.finished():
            if outcome.error is None:
                self._scheduler.adapter_loaded(outcome.digest, now_s, outcome.timing)
            else:
                chunks += self._scheduler.adapter_failed(outcome.digest, outcome.error, now_s, outcome.timing)
        chunks += self._scheduler.refuse_late(now_s)
        plan = self._scheduler.schedule(now_s)
        for digest in plan.evicted:
            self._adapters.evict(digest)
        for load in plan.loads:
            self._adapters.start_load(load)
        if plan.sequences:
            self._memory.give_way(is_busy=True)
            started_s = self._clock.monotonic_s()
            result = self._runner.execute(plan)
            step_s = self._clock.monotonic_s() - started_s
            self._scheduler.note_duration(plan, step_s)
            chunks += self._scheduler.commit(plan, result)
            self._advance_merging(plan, step_s)
        if not self._scheduler.has_runnable:
            self._memory.give_way(is_busy=False)
        self._check_when_idle()
        return chunks

    def _advance_merging(self, plan: StepPlan, step_s: float) -> None:
        if self._merging is not None and self._merge_policy is not None:
            for timed, lora_s in self._runner.lora_times():
                self._merge_policy.note_step(mix_of(timed.sequences), timed.merged, lora_s)
            for outcome in self._merging.advance(plan.merge_build, step_s):
                self._merge_policy.note_outcome(outcome)

    def stats(self) -> EngineStats:
        """Load and memory as of now."""
        return self._scheduler.stats()

    def _check_when_idle(self) -> None:
        if self._is_checked or self._scheduler.has_work:
            return
        now_s = self._clock.monotonic_s()
        if now_s >= self._next_check_s:
            self._scheduler.check_integrity()
            self._is_checked = True
            self._next_check_s = now_s + CHECK_INTERVAL_S

    def _check_vocabulary(self, token_ids: Sequence[int], field: str) -> None:
        highest, lowest = max(token_ids, default=0), min(token_ids, default=0)
        if highest >= self._vocab_size or lowest < 0:
            bad = highest if highest >= self._vocab_size else lowest
            raise InvalidRequest(f"token id {bad} is outside the vocabulary of {self._vocab_size} tokens", field=field)

    def close(self) -> None:
        """Release threads and memory."""
        self._memory.give_way(is_busy=False)
        self._adapters.close()
        self._memory.close()


def _decoder(
    settings: EngineSettings,
    arch: Architecture,
    weights: WeightSource,
    kernels: Kernels,
    clock: Clock,
    timer: LoraTimer | None,
    tier: TierClient | None,
) -> Decoder:
    context_tokens = settings.model.context_length

    def load(arena: Arena, *, is_found: bool = False) -> Decoder:
        # What another engine has made, from bytes that it verified, is taken as it is.
        with nullcontext() if is_found else weights.reading():
            return Decoder(arch, weights, kernels, context_tokens, timer, arena)

    if tier is None or kernels.layout is None:
        return load(OWN_ARENA)
    name = f"{settings.model.digest}/{settings.dtype}/{kernels.layout}"
    # No layout takes twice the room of the weights it is made of, but for the padding of small ones.
    most_bytes = 2 * settings.model.num_parameters * weights.dtype.itemsize + _ARENA_MARGIN_BYTES
    arena = SharedArena(tier, name, _STORED_DTYPES[weights.dtype], most_bytes, clock)
    try:
        model = load(arena, is_found=arena.is_found)
        arena.publish()
    except ArenaMismatch as mismatch:
        _logger.error("weights are laid out anew: %s", mismatch)
        return load(OWN_ARENA)
    finally:
        arena.close()
    return model


def _graphs(
    settings: EngineSettings, model: Decoder, kv: KVPool, pool_PX: torch.Tensor | None, recorder: Recorder | None
) -> DecodeGraphs | None:
    """Recorded decode steps, where the device gains by them; the pool's last page belongs to nobody there."""
    if recorder is None or pool_PX is None:
        return None
    sizes = GraphSizes(
        hidden=model.arch.hidden_size,
        max_rows=settings.max_sequences,
        max_pages=-(-settings.model.context_length // settings.page_tokens),
        page_tokens=settings.page_tokens,
        scratch_page=len(pool_PX) - 1,
    )
    return DecodeGraphs(partial(model.forward, pool=kv), recorder, sizes, pool_PX, model.timer)


def _merges(settings: EngineSettings) -> bool:
    return (settings.merge_in_place or settings.merge_bytes > 0) and not settings.deterministic


def _merging(
    settings: EngineSettings,
    model: Decoder,
    weights: WeightSource,
    resident: Callable[[AdapterDigest], ResidentAdapter | None],
    load_s: float,
    clock: Clock,
) -> tuple[Merging | None, MergePolicy | None]:
    """Who merges adapters, and who decides on it; nobody where it is switched off. Until a merge was measured, writing
    weights is taken to be as quick as loading them was, which took `load_s`."""
    if not _merges(settings):
        return None, None
    write_s_per_byte = load_s / max(settings.model.num_parameters * weights.dtype.itemsize, 1)
    policy = MergePolicy(write_s_per_byte, in_place=settings.merge_in_place)
    if settings.merge_in_place:
        return InPlaceMerge(model, weights, own_linears(model), resident, clock), policy
    return MergedCopies(model, weights, resident, settings.merge_bytes, clock), policy


def _dtype(settings: EngineSettings) -> torch.dtype:
    if settings.dtype not in DTYPES:
        raise ConfigurationError(f"dtype {settings.dtype!r} is not supported; choose {' or '.join(DTYPES)}")
    return DTYPES[settings.dtype]


def _check_pool(num_pages: int, page_bytes: int, pool_bytes: int) -> None:
    if num_pages < _MIN_PAGES:
        raise ConfigurationError(
            f"a page pool of {format_bytes(pool_bytes)} holds {num_pages} pages of "
            f"{format_bytes(page_bytes)}, at least {_MIN_PAGES} are needed; raise the memory budget"
        )
