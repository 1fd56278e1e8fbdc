"""Requests to a replica and the chunks it answers with.

A stream is identified by (request id, epoch). A new epoch begins whenever a replica takes the request up
again: after a crash, a preemption across machines or a migration. The new epoch's request carries the tokens
already generated, and its first chunk continues at that offset, so that duplicates can be dropped and gaps
are errors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from rekindle.errors import InvalidRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.sampling import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate.

    `generated_token_ids` are tokens sampled in earlier epochs; generation goes on after them and
    `sampling.max_tokens` counts them. `tenant_salt` separates prefix caches. A replica is shared fairly among the
    uses that tenants make of adapters; a request of `weight` 2 may have twice the share. Lower `priority` goes first.
    A request that cannot have its first token within `ttft_slo_s` seconds is refused as soon as that is clear; it has
    spent `waited_s` of them before it was submitted.
    """

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    epoch: int = 0
    adapter: AdapterDigest | None = None
    generated_token_ids: tuple[int, ...] = ()
    tenant_salt: str = ""
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    ttft_slo_s: float | None = None
    waited_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise InvalidRequest(f"weight must be a positive number, got {self.weight}", field="weight")
        if self.ttft_slo_s is not None and not 0 < self.ttft_slo_s < math.inf:
            raise InvalidRequest(f"ttft_slo_s must be a positive number, got {self.ttft_slo_s}", field="ttft_slo_ms")


@dataclass(frozen=True, slots=True)
class AbortRequest:
    """Stop a sequence and free what it holds; unknown ids are ignored."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probability of one token under the model's own distribution, before penalties and
    temperature, with the most likely alternatives in falling order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a replica did not take a request: the name of the error's class in `rekindle.errors`, and its attributes."""

    kind: str
    field: str | None = None
    code: str | None = None
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Tokens `offset .. offset + len(token_ids)` of a sequence's output.

    The last chunk has a `finish_reason`. A stop token is part of `token_ids`. `logprobs` is None unless asked
    for, and as long as `token_ids` otherwise. `prompt_logprobs` comes once, with the first chunk: one entry per
    prompt token, None for the first. `cached_tokens` counts prompt tokens found in the prefix cache and comes
    with the first chunk. With `FinishReason.ERROR`, `error` says what happened; if the request was refused, `refusal`
    tells how.
    """

    request_id: RequestId
    epoch: int
    offset: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    cached_tokens: int | None = None
    error: str | None = None
    refusal: Refusal | None = None
