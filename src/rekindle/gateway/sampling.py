"""From the fields of a request to the complete sampling settings of its sequences."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

from rekindle.errors import InvalidRequest
from rekindle.gateway.schemas import GenerationBody
from rekindle.gateway.served_model import ServedModel
from rekindle.protocol.sampling import SamplingParams

SEED_BITS = 63
MAX_LOGIT_BIASES = 300
MAX_STOP_TOKEN_IDS = 1024

Number = TypeVar("Number", int, float)


def sampling_params(
    body: GenerationBody, model: ServedModel, *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    """Complete settings for the first choice of a request; defaults are the model's own.

    Raises:
        InvalidRequest: a value is out of its range; the error names the field.
    """
    defaults, vocab_size = model.defaults, model.base.manifest.vocab_size
    stop_token_ids = tuple(body.stop_token_ids or ())
    _check_count("stop_token_ids", len(stop_token_ids), MAX_STOP_TOKEN_IDS)
    check_token_ids(stop_token_ids, vocab_size, "stop_token_ids")
    if not body.ignore_eos:
        stop_token_ids += tuple(i for i in model.base.manifest.eos_token_ids if i not in stop_token_ids)
    top_k = _or(body.top_k, defaults.top_k)
    return SamplingParams(
        max_tokens=max_tokens,
        seed=secrets.randbits(SEED_BITS) if body.seed is None else body.seed & ((1 << SEED_BITS) - 1),
        min_tokens=body.min_tokens or 0,
        temperature=_or(body.temperature, defaults.temperature),
        top_k=0 if top_k == -1 else min(top_k, vocab_size),
        top_p=_or(body.top_p, defaults.top_p),
        min_p=_or(body.min_p, defaults.min_p),
        repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_logit_bias(body.logit_bias or {}, vocab_size),
        stop_token_ids=stop_token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def seed_of_choice(seed: int, choice: int) -> int:
    """The seed of one of a request's choices: the first has the request's own, so that n does not change it."""
    if choice == 0:
        return seed
    digest = blake2b(f"{seed}:{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - SEED_BITS)


@dataclass(frozen=True, slots=True)
class Length:
    """How many tokens a request wants: `asked` in the field `field`, else `default`, else the rest of the context."""

    field: str
    asked: int | None
    least: int = 0
    default: int | None = None


def fit_context(prompt_tokens: int, length: Length, max_context_tokens: int) -> int:
    """How many tokens may be generated after the prompt.

    Raises:
        InvalidRequest: prompt and completion together pass the context, with the numbers.
    """
    if length.asked is not None and length.asked < length.least:
        message = f"`{length.field}` must be at least {length.least}, got {length.asked}"
        raise InvalidRequest(message, field=length.field, code="invalid_value")
    room = max_context_tokens - prompt_tokens
    wanted = length.asked if length.asked is not None else min(length.default or room, max(room, 1))
    if wanted > room:
        raise InvalidRequest(
            f"This model's maximum context length is {max_context_tokens} tokens. However, you requested "
            f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the prompt, {wanted} in the completion). "
            "Reduce the length of the prompt or of the completion.",
            field=length.field if length.asked is not None and room > 0 else "prompt",
            code="context_length_exceeded",
        )
    return wanted


def check_token_ids(token_ids: tuple[int, ...], vocab_size: int, field: str) -> None:
    """Refuse ids the model has no row for, naming the first."""
    if token_ids and (max(token_ids) >= vocab_size or min(token_ids) < 0):
        wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise InvalidRequest(
            f"`{field}` holds {wrong}, which is no token of this model; ids lie in [0, {vocab_size - 1}]",
            field=field,
            code="invalid_value",
        )


def _logit_bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    _check_count("logit_bias", len(biases), MAX_LOGIT_BIASES)
    pairs = []
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and str(int(key)) == key and int(key) < vocab_size):
            raise InvalidRequest(
                f"`logit_bias` holds the key {key[:40]!r}, which is no token id of this model; "
                f"keys are ids in [0, {vocab_size - 1}], written as strings",
                field="logit_bias",
                code="invalid_value",
            )
        pairs.append((int(key), bias))
    return tuple(pairs)


def _check_count(field: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(
            f"`{field}` may hold up to {limit} entries, got {count}; send fewer", field=field, code="invalid_value"
        )


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
