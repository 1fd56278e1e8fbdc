"""Drives one engine in this process and notes when each token came."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from rekindle.clock import SystemClock
from rekindle.engine.engine import DTYPES, Engine
from rekindle.engine.memory import page_bytes_for
from rekindle.engine.models.registry import read_architecture, read_config
from rekindle.errors import EngineFailed, InternalError
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import FinishReason, GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams

Adapter = tuple[AdapterManifest, Path]
_LONGEST_WAIT_S = 60.0


@dataclass(slots=True)
class Served:
    """One request: when it was due, and when each of its tokens came, in seconds of the monotonic clock."""

    due_s: float
    token_s: list[float] = field(default_factory=list)
    is_finished: bool = False

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.due_s

    @property
    def itl_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.token_s)]


def page_bytes(settings: EngineSettings) -> int:
    """Bytes of a page of an engine with these settings."""
    arch = read_architecture(read_config(Path(settings.model_dir)))
    return page_bytes_for(arch.attention[0], arch.num_layers, settings.page_tokens, DTYPES[settings.dtype])


class Driver:
    """An engine with a pool of `num_pages` pages that knows these adapters."""

    def __init__(self, settings: EngineSettings, num_pages: int, adapters: Sequence[Adapter], seed: int) -> None:
        self._clock = SystemClock()
        self._wakened = threading.Event()
        settings = replace(settings, memory_bytes=num_pages * page_bytes(settings))
        self.engine = Engine(settings, self._clock, self._wakened.set)
        self._model = settings.model
        self._draw = random.Random(seed)
        self._served: dict[RequestId, Served] = {}
        self._num_submitted = 0
        for adapter in adapters:
            self.add(adapter)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()

    def add(self, adapter: Adapter) -> None:
        """Make an adapter known."""
        manifest, path = adapter
        self.engine.add_adapter(manifest, str(path))

    def now_s(self) -> float:
        return self._clock.monotonic_s()

    def submit(
        self, adapter: AdapterDigest | None, prompt_tokens: int, max_tokens: int, due_s: float | None = None
    ) -> tuple[RequestId, Served]:
        """Queue a greedy request with a prompt of random tokens; its time counts from `due_s`, or from now."""
        prompt = tuple(self._draw.randrange(self._model.vocab_size) for _ in range(prompt_tokens))
        name = RequestId(f"bench-{self._num_submitted}")
        self._num_submitted += 1
        served = self._served[name] = Served(self.now_s() if due_s is None else due_s)
        self.engine.submit(
            GenerateRequest(name, prompt, SamplingParams(max_tokens, seed=0, temperature=0.0), adapter=adapter)
        )
        return name, served

    def abort(self, name: RequestId) -> None:
        """End a request; what it waits for goes on."""
        self._served.pop(name, None)
        self.engine.abort(name)

    def step(self, wait_s: float = _LONGEST_WAIT_S) -> float:
        """One step, after waiting up to `wait_s` for a load if there is nothing else to do; returns how long the step
        took.

        Raises:
            EngineFailed: a request ended with an error.
        """
        if not self.engine.has_runnable:
            self._wakened.wait(wait_s)
        self._wakened.clear()
        started_s = self.now_s()
        chunks = self.engine.step()
        ended_s = self.now_s()
        for chunk in chunks:
            if chunk.finish_reason is FinishReason.ERROR:
                raise EngineFailed(f"request {chunk.request_id} failed: {chunk.error}")
            if (served := self._served.get(chunk.request_id)) is not None:
                served.token_s += [ended_s] * len(chunk.token_ids)
                if chunk.finish_reason is not None:
                    served.is_finished = True
                    del self._served[chunk.request_id]
        return ended_s - started_s

    def finish(self) -> None:
        """Step until every request has ended."""
        while self._served:
            self.step()

    def absent(self, adapters: Sequence[Adapter]) -> AdapterDigest:
        """One of the adapters that is not resident.

        Raises:
            InternalError: all are.
        """
        resident = self.engine.stats().resident_adapters
        for manifest, _ in adapters:
            if manifest.digest not in resident:
                return manifest.digest
        raise InternalError(f"all {len(adapters)} adapters are resident, and one was to be loaded")

    def time_load(self, adapter: AdapterDigest) -> float:
        """Seconds that an otherwise idle engine takes to load an absent adapter.

        Raises:
            InternalError: it is there already, or no load of it begins.
        """
        num_loads = self.engine.stats().adapter_loads_total
        self.submit(adapter, 1, 1)
        started_s = self.now_s()
        self.step()
        if self.engine.stats().adapter_loads_total == num_loads:
            raise InternalError(f"adapter {adapter[:12]} was to be loaded, but no load began")
        self._wakened.wait(_LONGEST_WAIT_S)
        duration_s = self.now_s() - started_s
        self.finish()
        return duration_s
