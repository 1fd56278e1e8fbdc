"""One replica on one device: the scheduler, the runner and the adapters' memory, joined.

`step` is the whole loop body: take in finished adapter loads, plan, act, commit. Everything here belongs to one thread.
When the last sequence has ended, the page accounts are checked; an error in them ends the engine, because what it would
go on to compute cannot be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rekindle.clock import Clock
from rekindle.engine.adapters import AdapterMemory
from rekindle.engine.kernels.select import select_kernels
from rekindle.engine.memory import PagePool, page_bytes_for
from rekindle.engine.models.decoder import Decoder
from rekindle.engine.models.registry import read_architecture, read_config
from rekindle.engine.runner import Runner
from rekindle.engine.scheduler.scheduler import Scheduler, SchedulerConfig
from rekindle.engine.weights import Weights
from rekindle.errors import ConfigurationError, InvalidRequest
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineReady, EngineSettings, EngineStats
from rekindle.store.model_layout import tensor_shapes
from rekindle.units import format_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
CHECK_INTERVAL_S = 10.0
"""How far apart checks of the page accounts are at least: each takes time in proportion to the pool."""
_MIN_PAGES = 4


class Engine:
    """See the module. `wake` is called from another thread when there may be something new to run.

    Raises:
        ConfigurationError: the memory budget does not hold a usable pool, or a setting is out of range.
        ModelRejected: the model's files do not match its configuration.
    """

    def __init__(self, settings: EngineSettings, clock: Clock, wake: Callable[[], None]) -> None:
        started_s = clock.monotonic_s()
        torch.set_num_threads(settings.num_threads)
        torch.set_grad_enabled(False)
        dtype = _dtype(settings)
        directory = Path(settings.model_dir)
        config = read_config(directory)
        arch = read_architecture(config)
        context_tokens = settings.model.context_length
        weights = Weights(directory / "model.safetensors", dtype, tensor_shapes(config))
        kernels = select_kernels(set(arch.attention), deterministic=settings.deterministic)
        model = Decoder(arch, weights, kernels, context_tokens)
        weights.release_pages()
        loaded_s = clock.monotonic_s()

        shape = arch.attention[0]
        page_bytes = page_bytes_for(shape, arch.num_layers, settings.page_tokens, dtype)
        num_pages = settings.memory_bytes // page_bytes
        _check_pool(num_pages, page_bytes, settings)
        self._pool = PagePool(num_pages, page_bytes)
        self._adapters = AdapterMemory(self._pool, arch.num_layers, dtype, wake)
        kv = self._pool.kv(shape, arch.num_layers, settings.page_tokens, dtype)
        self._runner = Runner(model, kv, self._adapters)
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
                token_bytes=arch.num_layers * 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize,
                element_bytes=dtype.itemsize,
                max_step_tokens=settings.max_step_tokens,
                max_sequences=settings.max_sequences,
                max_queued=settings.max_queued,
                max_context_tokens=context_tokens,
            )
        )
        self.ready = EngineReady(
            num_pages=num_pages,
            page_bytes=page_bytes,
            page_tokens=settings.page_tokens,
            max_context_tokens=context_tokens,
            parts_s=(("weights", loaded_s - started_s), ("pool", clock.monotonic_s() - loaded_s)),
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
        self._adapters.register(manifest.digest, Path(path))
        self._scheduler.add_adapter(manifest)

    def remove_adapter(self, digest: AdapterDigest) -> None:
        """Forget a version once no sequence uses it."""
        self._scheduler.remove_adapter(digest)

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
        now_s = self._clock.monotonic_s()
        for outcome in self._adapters.finished():
            if outcome.error is None:
                self._scheduler.adapter_loaded(outcome.digest, now_s)
            else:
                chunks += self._scheduler.adapter_failed(outcome.digest, outcome.error, now_s)
        chunks += self._scheduler.refuse_late(now_s)
        plan = self._scheduler.schedule(now_s)
        for digest in plan.evicted:
            self._adapters.evict(digest)
        for load in plan.loads:
            self._adapters.start_load(load)
        if plan.sequences:
            started_s = self._clock.monotonic_s()
            result = self._runner.execute(plan)
            self._scheduler.note_duration(plan, self._clock.monotonic_s() - started_s)
            chunks += self._scheduler.commit(plan, result)
        self._check_when_idle()
        return chunks

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
        self._adapters.close()
        self._pool.close()


def _dtype(settings: EngineSettings) -> torch.dtype:
    if settings.dtype not in DTYPES:
        raise ConfigurationError(f"dtype {settings.dtype!r} is not supported; choose {' or '.join(DTYPES)}")
    return DTYPES[settings.dtype]


def _check_pool(num_pages: int, page_bytes: int, settings: EngineSettings) -> None:
    if num_pages < _MIN_PAGES:
        raise ConfigurationError(
            f"a page pool of {format_bytes(settings.memory_bytes)} holds {num_pages} pages of "
            f"{format_bytes(page_bytes)}, at least {_MIN_PAGES} are needed; raise the memory budget"
        )
