"""An engine without a model: a token is a hash of the prompt, the adapter and the position, and faults come to order.

    replica = Replica(settings, SystemClock(), launcher=CommandLauncher(fake_engine_command(Faults(poison=13))))

It runs as a real process and speaks the real protocol, so that supervision, gateways and clients can be tested against
it in milliseconds. `expected_tokens` says what it answers. A request that is taken up again with tokens it would not
have generated itself is answered with an error, so that a broken resumption does not go unnoticed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rekindle.clock import Clock, SystemClock
from rekindle.engine.process import serve
from rekindle.errors import ConfigurationError, InvalidRequest, NotFound, Overloaded
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.estimates import DISK_TO_DEVICE, StageEstimate
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineReady, EngineSettings, EngineStats, PoolBytes

VOCABULARY_TOKENS = 1000
NUM_PAGES, PAGE_BYTES = 1000, 4096
"""Of the page pool it claims to have. A sequence counts as one full page."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, and when. Steps are counted from 1 in each engine process.

    `crash_at_step`: the process dies at that step. `poison`: it dies when it computes a sequence whose prompt holds
    this token. `hang_at_step`: it stops for good without dying. `step_s`: every step takes that many seconds longer.
    `crash_at_start`: it dies before it is ready. `configuration_error`: it refuses to start, with this message. With
    `marker`, the path of a file that does not exist, the first fault makes the file, and no fault follows; slowness
    is not affected.
    """

    crash_at_step: int | None = None
    poison: int | None = None
    hang_at_step: int | None = None
    step_s: float = 0.0
    crash_at_start: bool = False
    configuration_error: str | None = None
    marker: str | None = None


def fake_engine_command(faults: Faults | None = None) -> tuple[str, ...]:
    """The command of a fake engine, for a `CommandLauncher`."""
    command = [sys.executable, "-m", "rekindle.testing.fake_engine"]
    for name, value in asdict(faults or Faults()).items():
        if value:
            command.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return tuple(command)


def expected_tokens(request: GenerateRequest) -> tuple[int, ...]:
    """All tokens that a request gets from a fake engine, those of earlier epochs included."""
    sampling = request.sampling
    tokens: list[int] = []
    for position in range(sampling.max_tokens):
        tokens.append(_token(request, position))
        if tokens[-1] in sampling.stop_token_ids and position >= sampling.min_tokens:
            break
    return tuple(tokens)


class FakeEngine:
    """Obeys the contract of an engine (`rekindle.engine.process.EngineLike`): one token per sequence and step.

    It claims to have learnt from one load more than the engine before it.
    """

    def __init__(self, settings: EngineSettings, faults: Faults) -> None:
        if faults.crash_at_start:
            self._fail(faults, _die)
        if faults.configuration_error is not None:
            raise ConfigurationError(faults.configuration_error)
        self._settings, self._faults = settings, faults
        self._sequences: dict[RequestId, GenerateRequest] = {}
        self._num_generated: dict[RequestId, int] = {}
        self._adapters: set[AdapterDigest] = set()
        self._answers: list[TokenChunk] = []
        self._num_steps = self._num_tokens = self._num_refused = 0
        self._num_loads = 1 + sum(known.num_observations for known in settings.load_estimates)
        self.ready = EngineReady(
            num_pages=NUM_PAGES,
            page_bytes=PAGE_BYTES,
            page_tokens=settings.page_tokens,
            max_context_tokens=settings.model.context_length,
            parts_s=(),
        )

    @property
    def has_runnable(self) -> bool:
        return bool(self._sequences or self._answers)

    @property
    def next_deadline_s(self) -> float | None:
        return None

    def add_adapter(self, manifest: AdapterManifest, path: str) -> None:
        """Make a version known; its file is not read."""
        self._adapters.add(manifest.digest)

    def remove_adapter(self, digest: AdapterDigest) -> None:
        self._adapters.discard(digest)

    def submit(self, request: GenerateRequest) -> None:
        """Queue a sequence; refuses what a real engine refuses."""
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt has no tokens; it needs at least one", field="prompt")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise NotFound(f"adapter version {request.adapter} is unknown here", field="model", code="model_not_found")
        settings = self._settings
        if not request.epoch and len(self._sequences) >= settings.max_sequences + settings.max_queued:
            self._num_refused += 1
            raise Overloaded(f"{len(self._sequences)} requests are open already", retry_after_s=1.0)
        generated = request.generated_token_ids
        if any(token != _token(request, position) for position, token in enumerate(generated)):
            self._answers.append(_chunk(request, len(generated), error="it is resumed with tokens not of its own"))
            return
        self._sequences[request.request_id] = request
        self._num_generated[request.request_id] = len(generated)

    def abort(self, request_id: RequestId) -> None:
        self._sequences.pop(request_id, None)
        self._num_generated.pop(request_id, None)

    def step(self) -> list[TokenChunk]:
        """One token for each of the first `max_sequences` sequences, unless a fault is due."""
        chunks, self._answers = self._answers, []
        running = list(self._sequences.values())[: self._settings.max_sequences]
        if running:
            self._num_steps += 1
            self._misbehave(running)
            chunks += [self._advance(request) for request in running]
        return chunks

    def stats(self) -> EngineStats:
        num_running = min(len(self._sequences), self._settings.max_sequences)
        return EngineStats(
            num_waiting=len(self._sequences) - num_running,
            num_running=num_running,
            pages_total=NUM_PAGES,
            pages_free=NUM_PAGES - num_running,
            pages_kv_in_use=num_running,
            pages_adapter=0,
            pages_prefix_cache=0,
            load_estimates=(StageEstimate(DISK_TO_DEVICE, 0.001, 1e9, self._num_loads, 0.1),),
            pool_bytes=PoolBytes(
                adapters_in_use=0,
                adapters_loading=0,
                adapters_idle=0,
                kv_in_use=num_running * PAGE_BYTES,
                prefix_cache=0,
                free=(NUM_PAGES - num_running) * PAGE_BYTES,
                waste_adapter_tails=0,
                waste_kv_tails=0,
                waste_padding=0,
            ),
            resident_adapters=tuple(sorted(self._adapters)),
            num_adapter_loads=0,
            prompt_tokens_total=0,
            generated_tokens_total=self._num_tokens,
            prefix_queries_total=0,
            prefix_hits_total=0,
            preemptions_total=0,
            adapter_loads_total=0,
            adapter_load_s_total=0.0,
            adapter_evictions_total=0,
            prefix_evictions_total=0,
            refused_late_total=0,
            refused_full_total=self._num_refused,
            steps_total=self._num_steps,
        )

    def close(self) -> None:
        """Nothing is held."""

    def _misbehave(self, running: Sequence[GenerateRequest]) -> None:
        faults = self._faults
        is_poisoned = any(faults.poison in request.prompt_token_ids for request in running)
        if is_poisoned or self._num_steps == faults.crash_at_step:
            self._fail(faults, _die)
        if self._num_steps == faults.hang_at_step:
            self._fail(faults, _hang)
        time.sleep(faults.step_s)

    @staticmethod
    def _fail(faults: Faults, how: Callable[[], None]) -> None:
        if faults.marker is not None:
            marker = Path(faults.marker)
            if marker.exists():
                return
            marker.touch()
        how()

    def _advance(self, request: GenerateRequest) -> TokenChunk:
        position = self._num_generated[request.request_id]
        chunk = _chunk(request, position)
        self._num_generated[request.request_id] += 1
        self._num_tokens += 1
        if chunk.finish_reason is not None:
            del self._sequences[request.request_id], self._num_generated[request.request_id]
        return chunk


def _chunk(request: GenerateRequest, position: int, error: str | None = None) -> TokenChunk:
    sampling = request.sampling
    is_first = position == len(request.generated_token_ids)
    token = _token(request, position)
    finish_reason = FinishReason.LENGTH if position + 1 >= sampling.max_tokens else None
    if token in sampling.stop_token_ids and position >= sampling.min_tokens:
        finish_reason = FinishReason.STOP
    return TokenChunk(
        request_id=request.request_id,
        epoch=request.epoch,
        offset=position,
        token_ids=() if error or not sampling.max_tokens else (token,),
        finish_reason=FinishReason.ERROR if error else finish_reason,
        logprobs=None if sampling.logprobs is None or error else (_scores(token, position, sampling.logprobs),),
        prompt_logprobs=_prompt_scores(request) if is_first and not position else None,
        cached_tokens=0 if is_first else None,
        error=error,
    )


def _prompt_scores(request: GenerateRequest) -> tuple[TokenLogprobs | None, ...] | None:
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return None
    scores = (_scores(token, position, num_top) for position, token in enumerate(request.prompt_token_ids))
    return (None, *list(scores)[1:])


def _scores(token: int, position: int, num_top: int) -> TokenLogprobs:
    top = tuple(((token + rank) % VOCABULARY_TOKENS, -float(position + rank)) for rank in range(num_top))
    return TokenLogprobs(token, -float(position), top)


def _token(request: GenerateRequest, position: int) -> int:
    key = repr((request.prompt_token_ids, request.adapter, position)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") % VOCABULARY_TOKENS


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        signal.pause()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a fake engine as a process of its own; its faults are options of the same names."""
    parser = argparse.ArgumentParser(prog="rekindle.testing.fake_engine", description=Faults.__doc__)
    parser.add_argument("--fd", type=int, required=True)
    for option, kind in (("crash-at-step", int), ("poison", int), ("hang-at-step", int), ("step-s", float)):
        parser.add_argument(f"--{option}", type=kind, default=0.0 if kind is float else None)
    parser.add_argument("--crash-at-start", action="store_true")
    parser.add_argument("--configuration-error")
    parser.add_argument("--marker")
    parsed = parser.parse_args(arguments)
    faults = Faults(**{field.name: getattr(parsed, field.name) for field in fields(Faults)})

    def make_engine(settings: EngineSettings, clock: Clock, wake: Callable[[], None]) -> FakeEngine:
        return FakeEngine(settings, faults)

    return serve(parsed.fd, make_engine, SystemClock())


if __name__ == "__main__":
    sys.exit(main())
