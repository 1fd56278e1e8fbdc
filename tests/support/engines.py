"""Engines in the test's own process, and requests driven through them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rekindle.clock import Clock, SystemClock
from rekindle.engine.devices import Device
from rekindle.engine.engine import Engine
from rekindle.engine.weights import WeightSource
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.models import ModelManifest
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.store.tier_client import TierClient
from rekindle.units import MIB


@dataclass(slots=True)
class Output:
    """All that one request was answered."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None


class LocalEngine:
    """An engine driven step by step by the test."""

    def __init__(
        self,
        model_dir: Path,
        manifest: ModelManifest,
        clock: Clock | None = None,
        device: Device | None = None,
        weights: WeightSource | None = None,
        tier: TierClient | None = None,
        **changes: object,
    ) -> None:
        settings = {
            "model_dir": str(model_dir),
            "model": manifest,
            "dtype": "float32",
            "memory_bytes": 8 * MIB,
            "page_tokens": 16,
            "max_step_tokens": 64,
            "max_sequences": 32,
            "max_queued": 256,
            "num_threads": 1,
            **changes,
        }
        self.model_dir, self.manifest = model_dir, manifest
        self._wakened = threading.Event()
        self._num_loads = 0
        self.engine = Engine(
            EngineSettings(**settings),  # type: ignore[arg-type]
            clock or SystemClock(),
            self._wakened.set,
            device,
            weights,
            tier,
        )
        self.outputs: dict[str, Output] = {}

    def add_adapter(self, directory: Path, manifest: AdapterManifest) -> AdapterDigest:
        self.engine.add_adapter(manifest, str(directory / "adapter.safetensors"))
        return manifest.digest

    def submit(self, name: str, request: GenerateRequest) -> None:
        self.outputs[name] = Output()
        self.engine.submit(request)

    def step(self) -> None:
        """One step; waits for an adapter load if nothing else can be done."""
        self._num_loads = self.engine.stats().adapter_loads_total
        if not self.engine.has_runnable and self._unfinished():
            self._wakened.wait(10)
        self._wakened.clear()
        for chunk in self.engine.step():
            output = self.outputs[chunk.request_id]
            assert chunk.offset == len(output.token_ids)
            output.token_ids += chunk.token_ids
            output.logprobs += chunk.logprobs or ()
            output.prompt_logprobs = chunk.prompt_logprobs or output.prompt_logprobs
            if chunk.cached_tokens is not None:
                output.cached_tokens = chunk.cached_tokens
            output.finish_reason, output.error = chunk.finish_reason, chunk.error

    def await_loads(self) -> None:
        """Let the loads that the latest step began end before the next, as they do where steps are long."""
        if self.engine.stats().adapter_loads_total > self._num_loads:
            assert self._wakened.wait(10)

    def run(self, requests: Iterable[GenerateRequest] = (), max_steps: int = 20_000) -> dict[str, Output]:
        """Submit, then step until everything has finished."""
        for request in requests:
            self.submit(request.request_id, request)
        for _ in range(max_steps):
            if not self._unfinished():
                return self.outputs
            self.step()
        raise AssertionError(f"unfinished after {max_steps} steps: {self._unfinished()}")

    def close(self) -> None:
        self.engine.close()

    def _unfinished(self) -> list[str]:
        return [name for name, output in self.outputs.items() if output.finish_reason is None]


def greedy(
    name: str,
    prompt: Iterable[int],
    max_tokens: int,
    adapter: AdapterDigest | None = None,
    **sampling: object,
) -> GenerateRequest:
    """A greedy request without stop tokens, unless `sampling` says otherwise."""
    settings = {"max_tokens": max_tokens, "seed": 0, "temperature": 0.0, **sampling}
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**settings),  # type: ignore[arg-type]
        adapter=adapter,
    )
