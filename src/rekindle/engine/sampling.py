"""Choosing tokens from logits.

A draw depends on nothing but the seed, the token's position and the distribution: one uniform number per token, taken
from a hash, is looked up in the cumulative distribution (see `draw`). Log-probabilities are the model's own, before any
change. Suffixes: R rows to sample, V vocabulary, N elements of the logits seen as one vector.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rekindle.engine.draw import NOT_FINITE, Choose, Draw, choose_on_cpu
from rekindle.engine.transfer import to_device
from rekindle.protocol.generation import TokenLogprobs
from rekindle.protocol.sampling import SamplingParams

_LEAST_TEMPERATURE = 1e-5
"""Below this a draw is the argmax, as in vLLM; dividing by less would overflow."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row to sample: its settings, the prompt and the tokens generated so far, which fix the draw's position."""

    params: SamplingParams
    prompt: Sequence[int]
    generated: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token, and its log-probability with alternatives if they were asked for; or, with `error`, why none
    could be chosen."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


_NOT_FINITE = Sampled(0, error="the model's output is not finite for this request")
_NOTHING_LEFT = Sampled(0, error="logit_bias, penalties and forbidden stop tokens leave no token to choose")


def sample(logits_RV: torch.Tensor, rows: Sequence[SampleRow], choose: Choose | None = None) -> list[Sampled]:
    """Choose one token for each row of float32 logits, which are left unchanged.

    On a GPU the host waits once, for the tokens, and again for log-probabilities where a row asks for them.
    """
    choose = choose or _choose_on(logits_RV.device)
    draws = [_draw_of(row) for row in rows]
    changed = [r for r, row in enumerate(rows) if row.params.changes_logits or _forbids_stop(row)]
    wait = choose(logits_RV, [None if r in changed else draw for r, draw in enumerate(draws)] if changed else draws)
    if changed:
        adjusted = _adjusted(logits_RV, rows, changed)
        wait_for_changed = choose(adjusted, [draws[r] for r in changed])
    sampled = [_NOT_FINITE if token_id == NOT_FINITE else Sampled(token_id) for token_id in wait()]
    if changed:
        for r, token_id in zip(changed, wait_for_changed(), strict=True):
            if sampled[r].error is None:
                sampled[r] = _NOTHING_LEFT if token_id == NOT_FINITE else Sampled(token_id)
    return _with_logprobs(logits_RV, rows, sampled)


def logprobs_of(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability of one given token per row, with the `num_top` most likely tokens."""
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen_R1 = logprobs_RV.gather(1, to_device(list(token_ids), torch.int64, logits_RV.device).unsqueeze(1))
    top = logprobs_RV.topk(num_top, dim=-1)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, (logprob,), ids, values in zip(
            token_ids, chosen_R1.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position only."""
    digest = hashlib.blake2b(struct.pack("<Qq", seed & (1 << 64) - 1, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _choose_on(device: torch.device) -> Choose:
    if device.type == "cpu":
        return choose_on_cpu
    from rekindle.engine.kernels.gpu.sampling import choose_on_gpu  # an engine on a CPU runs without Triton

    return choose_on_gpu


def _draw_of(row: SampleRow) -> Draw | None:
    params = row.params
    if params.temperature < _LEAST_TEMPERATURE:
        return None
    number = uniform(params.seed, len(row.prompt) + len(row.generated))
    return Draw(params.temperature, params.top_k, params.top_p, params.min_p, number)


def _forbids_stop(row: SampleRow) -> bool:
    return len(row.generated) < row.params.min_tokens and bool(row.params.stop_token_ids)


def _adjusted(logits_RV: torch.Tensor, rows: Sequence[SampleRow], changed: Sequence[int]) -> torch.Tensor:
    """A copy of the changed rows after biases, penalties and the ban on early stops, in vLLM's order."""
    device, vocabulary = logits_RV.device, logits_RV.shape[1]
    adjusted_RV = logits_RV[to_device(changed, torch.int64, device)]
    chosen = [rows[r] for r in changed]
    logits_N = adjusted_RV.view(-1)
    _apply_biases(logits_N, chosen, vocabulary)
    _apply_repetition_penalties(logits_N, chosen, vocabulary)
    _apply_output_penalties(logits_N, chosen, vocabulary)
    _forbid_stops(logits_N, chosen, vocabulary)
    return adjusted_RV


def _apply_biases(logits_N: torch.Tensor, rows: Sequence[SampleRow], vocabulary: int) -> None:
    places: list[int] = []
    biases: list[float] = []
    for r, row in enumerate(rows):
        for token_id, bias in row.params.logit_bias:
            places.append(r * vocabulary + token_id)
            biases.append(bias)
    if places:
        logits_N[to_device(places, torch.int64, logits_N.device)] += to_device(biases, torch.float32, logits_N.device)


def _apply_repetition_penalties(logits_N: torch.Tensor, rows: Sequence[SampleRow], vocabulary: int) -> None:
    """CTRL's (arXiv 1909.05858), over prompt and output. Positive logits are divided, others multiplied."""
    penalised = [(r, row) for r, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not penalised:
        return
    places: list[int] = []
    penalties: list[float] = []
    for r, row in penalised:
        seen = {*row.prompt, *row.generated}
        places += [r * vocabulary + token_id for token_id in seen]
        penalties += [row.params.repetition_penalty] * len(seen)
    at = to_device(places, torch.int64, logits_N.device)
    penalty = to_device(penalties, torch.float32, logits_N.device)
    value = logits_N[at]
    logits_N[at] = torch.where(value > 0, value / penalty, value * penalty)


def _apply_output_penalties(logits_N: torch.Tensor, rows: Sequence[SampleRow], vocabulary: int) -> None:
    """Presence and frequency penalties, over the output alone."""
    places: list[int] = []
    losses: list[float] = []
    for r, row in enumerate(rows):
        params = row.params
        if params.presence_penalty or params.frequency_penalty:
            for token_id, count in Counter(row.generated).items():
                places.append(r * vocabulary + token_id)
                losses.append(params.presence_penalty + params.frequency_penalty * count)
    if places:
        logits_N[to_device(places, torch.int64, logits_N.device)] -= to_device(losses, torch.float32, logits_N.device)


def _forbid_stops(logits_N: torch.Tensor, rows: Sequence[SampleRow], vocabulary: int) -> None:
    places = [
        r * vocabulary + token_id
        for r, row in enumerate(rows)
        if _forbids_stop(row)
        for token_id in row.params.stop_token_ids
        if token_id < vocabulary
    ]
    if places:
        logits_N[to_device(places, torch.int64, logits_N.device)] = -torch.inf


def _with_logprobs(logits_RV: torch.Tensor, rows: Sequence[SampleRow], sampled: list[Sampled]) -> list[Sampled]:
    """The tokens with their log-probabilities, for the rows that ask for them."""
    asked = [r for r, row in enumerate(rows) if row.params.logprobs is not None and sampled[r].error is None]
    if not asked:
        return sampled
    num_top = max(rows[r].params.logprobs or 0 for r in asked)
    found = logprobs_of(
        logits_RV[to_device(asked, torch.int64, logits_RV.device)], [sampled[r].token_id for r in asked], num_top
    )
    for r, logprobs in zip(asked, found, strict=True):
        sampled[r] = replace(sampled[r], logprobs=replace(logprobs, top=logprobs.top[: rows[r].params.logprobs]))
    return sampled
