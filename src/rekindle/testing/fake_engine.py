"""An engine without a model: tokens are a hash of what came before, and faults happen on request.

    replica = Replica(settings, clock, command=fake_engine_command("--poison", "13"))

It runs as a real process and obeys the real protocol, so supervision, gateways and clients can be tested against it in
milliseconds. `expected_tokens` says what it will answer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rekindle.clock import Clock, SystemClock
from rekindle.engine.process import serve
from rekindle.errors import NotFound
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineReady, EngineSettings, EngineStats

VOCABULARY = 1000


def fake_engine_command(*arguments: str) -> tuple[str, ...]:
    """The command of a fake engine with these faults, for `Replica(command=...)`."""
    return (sys.executable, "-m", "rekindle.testing.fake_engine", *arguments)


def expected_tokens(request: GenerateRequest) -> list[int]:
    """All tokens a fake engine generates for a request, from its very first."""
    return [_token(request, position) for position in range(request.sampling.max_tokens)]


@dataclass(frozen=True, slots=True)
class Faults:
    """The process dies at a step, or when a prompt holds a token; it hangs at a step; steps take long."""

    crash_at_step: int | None = None
    poison: int | None = None
    hang_at_step: int | None = None
    step_s: float = 0.0


@dataclass(slots=True)
class _Sequence:
    request: GenerateRequest
    num_generated: int


@dataclass(slots=True)
class FakeEngine:
    """Obeys the contract of an engine; see the module."""

    settings: EngineSettings
    faults: Faults = field(default_factory=Faults)
    _sequences: dict[RequestId, _Sequence] = field(default_factory=dict)
    _adapters: set[AdapterDigest] = field(default_factory=set)
    _num_steps: int = 0

    @property
    def ready(self) -> EngineReady:
        return EngineReady(num_pages=1000, page_bytes=4096, page_tokens=16, max_context_tokens=4096, parts_s=())

    @property
    def has_runnable(self) -> bool:
        return bool(self._sequences)

    def add_adapter(self, manifest: AdapterManifest, path: str) -> None:
        self._adapters.add(manifest.digest)

    def remove_adapter(self, digest: AdapterDigest) -> None:
        self._adapters.discard(digest)

    def submit(self, request: GenerateRequest) -> None:
        if request.adapter is not None and request.adapter not in self._adapters:
            raise NotFound(f"adapter version {request.adapter[:12]} is unknown", code="model_not_found")
        self._sequences[request.request_id] = _Sequence(request, len(request.generated_token_ids))

    def abort(self, request_id: RequestId) -> None:
        self._sequences.pop(request_id, None)

    def step(self) -> list[TokenChunk]:
        """One token for every sequence, unless a fault is due."""
        if not self._sequences:
            return []
        self._num_steps += 1
        self._misbehave()
        chunks = [self._advance(sequence) for sequence in self._sequences.values()]
        for chunk in chunks:
            if chunk.finish_reason is not None:
                del self._sequences[chunk.request_id]
        return chunks

    def stats(self) -> EngineStats:
        running, adapters = len(self._sequences), tuple(sorted(self._adapters))
        return EngineStats(0, running, 1000, 1000, 0, 0, 0, adapters, 0, 0, 0, 0, 0, 0, self._num_steps)

    def close(self) -> None:
        """Nothing is held."""

    def _misbehave(self) -> None:
        faults = self.faults
        poisoned = any(faults.poison in s.request.prompt_token_ids for s in self._sequences.values())
        if self._num_steps == faults.crash_at_step or poisoned:
            os._exit(17)
        if self._num_steps == faults.hang_at_step:
            time.sleep(3600)
        time.sleep(faults.step_s)

    def _advance(self, sequence: _Sequence) -> TokenChunk:
        request, position = sequence.request, sequence.num_generated
        is_first = position == len(request.generated_token_ids)
        sequence.num_generated += 1
        token = _token(request, position)
        params = request.sampling
        return TokenChunk(
            request_id=request.request_id,
            epoch=request.epoch,
            offset=position,
            token_ids=(token,),
            finish_reason=FinishReason.LENGTH if sequence.num_generated >= params.max_tokens else None,
            logprobs=None if params.logprobs is None else (TokenLogprobs(token, -float(position)),),
            prompt_logprobs=(None,) if is_first and params.prompt_logprobs is not None else None,
            cached_tokens=0 if is_first else None,
        )


def _token(request: GenerateRequest, position: int) -> int:
    seed = repr((request.prompt_token_ids, request.adapter, position)).encode()
    return int.from_bytes(hashlib.blake2b(seed, digest_size=4).digest(), "little") % VOCABULARY


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a fake engine as a process of its own."""
    parser = argparse.ArgumentParser(prog="rekindle.testing.fake_engine")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--crash-at-step", type=int)
    parser.add_argument("--poison", type=int, metavar="TOKEN")
    parser.add_argument("--hang-at-step", type=int)
    parser.add_argument("--step-s", type=float, default=0.0)
    parsed = parser.parse_args(arguments)
    faults = Faults(parsed.crash_at_step, parsed.poison, parsed.hang_at_step, parsed.step_s)

    def make(settings: EngineSettings, clock: Clock, wake: Callable[[], None]) -> FakeEngine:
        return FakeEngine(settings, faults)

    return serve(parsed.fd, make, SystemClock())


if __name__ == "__main__":
    sys.exit(main())
