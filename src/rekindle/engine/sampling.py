"""Choosing tokens from logits.

A draw depends on nothing but the seed, the token's position and the distribution: one uniform number per token, taken
from a hash, is looked up in the cumulative distribution. Log-probabilities are the model's own, before any change.
Suffixes: R rows to sample, V vocabulary.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rekindle.protocol.generation import TokenLogprobs
from rekindle.protocol.sampling import SamplingParams

_CANDIDATES = 1024
"""How many of the most likely tokens are sorted before a full sort is tried: top_p rarely needs more."""

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


def sample(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose one token for each row of float32 logits, which are left unchanged."""
    best_R = logits_RV.max(-1)
    token_ids = best_R.indices.tolist()
    finite = best_R.values.isfinite().tolist()
    if all(_is_plain_greedy(row) for row in rows):
        return [Sampled(token_id) if ok else _NOT_FINITE for token_id, ok in zip(token_ids, finite, strict=True)]
    return [_choose(logits_RV[r], row, token_ids[r]) if finite[r] else _NOT_FINITE for r, row in enumerate(rows)]


def logprobs_of(logits_RV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Log-probability of one given token per row, with the `num_top` most likely tokens."""
    logprobs_RV = logits_RV.log_softmax(-1)
    chosen = logprobs_RV.gather(1, torch.tensor(token_ids).unsqueeze(1)).squeeze(1).tolist()
    top = logprobs_RV.topk(num_top, dim=-1)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in zip(
            token_ids, chosen, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed and the position only."""
    digest = hashlib.blake2b(struct.pack("<Qq", seed & (1 << 64) - 1, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def _is_plain_greedy(row: SampleRow) -> bool:
    params = row.params
    return _is_greedy(params) and params.logprobs is None and not params.changes_logits and not _forbids_stop(row)


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _LEAST_TEMPERATURE


def _choose(logits_V: torch.Tensor, row: SampleRow, likeliest: int) -> Sampled:
    """One row; `likeliest` is the argmax of its unchanged logits."""
    params = row.params
    adjusted_V = _adjusted(logits_V, row)
    if adjusted_V is not logits_V:
        likeliest = int(adjusted_V.argmax())
        if not adjusted_V[likeliest].isfinite():
            return _NOTHING_LEFT
    token_id = likeliest if _is_greedy(params) else _draw(adjusted_V, row)
    if params.logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, logprobs_of(logits_V.unsqueeze(0), [token_id], params.logprobs)[0])


def _adjusted(logits_V: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """Logits after biases, penalties and the ban on early stops, in vLLM's order; the same tensor if there are none."""
    if not (row.params.changes_logits or _forbids_stop(row)):
        return logits_V
    adjusted_V = logits_V.clone()
    if row.params.logit_bias:
        token_ids, biases = zip(*row.params.logit_bias, strict=True)
        adjusted_V[torch.tensor(token_ids)] += torch.tensor(biases)
    _apply_penalties(adjusted_V, row)
    if _forbids_stop(row):
        stops = torch.tensor(row.params.stop_token_ids)
        adjusted_V[stops[stops < len(adjusted_V)]] = -torch.inf
    return adjusted_V


def _forbids_stop(row: SampleRow) -> bool:
    return len(row.generated) < row.params.min_tokens and bool(row.params.stop_token_ids)


def _apply_penalties(logits_V: torch.Tensor, row: SampleRow) -> None:
    """Repetition penalty (CTRL, arXiv 1909.05858) over prompt and output; presence and frequency over the output."""
    params = row.params
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(list({*row.prompt, *row.generated}), dtype=torch.int64)
        values = logits_V[seen]
        logits_V[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if row.generated and (params.presence_penalty or params.frequency_penalty):
        used, counts = torch.unique(torch.tensor(list(row.generated), dtype=torch.int64), return_counts=True)
        logits_V[used] -= params.presence_penalty + params.frequency_penalty * counts


def _draw(logits_V: torch.Tensor, row: SampleRow) -> int:
    """Inverse-CDF draw after temperature, then min_p, top_k and top_p in vLLM's order."""
    params = row.params
    probabilities_V = ((logits_V - logits_V.max()) / params.temperature).softmax(-1)
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        return _inverse_cdf(probabilities_V, row)
    values, token_ids = _truncated(probabilities_V, params)
    return int(token_ids[_inverse_cdf(values, row)])


def _truncated(probabilities_V: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept tokens' probabilities (not renormalised), most likely first, and their ids."""
    vocabulary = len(probabilities_V)
    values, token_ids = probabilities_V.topk(min(params.top_k or _CANDIDATES, vocabulary))
    if not params.top_k and not _covers(values, params):
        values, token_ids = probabilities_V.topk(vocabulary)
    if params.min_p > 0.0:
        values = values[values >= params.min_p * values[0]]
    if params.top_p < 1.0:
        # top_p is a share of what min_p and top_k have left, which without them is everything.
        mass = float(values.sum(dtype=torch.float64)) if params.top_k or params.min_p else 1.0
        mass_before = values.double().cumsum(0) - values
        values = values[mass_before < params.top_p * mass]
    return values, token_ids[: len(values)]


def _covers(values: torch.Tensor, params: SamplingParams) -> bool:
    """Whether the most likely tokens, given in falling order, hold all that min_p, or else top_p, would keep."""
    if params.min_p > 0.0:
        return bool(values[-1] < params.min_p * values[0])
    return float(values.sum(dtype=torch.float64)) >= params.top_p


def _inverse_cdf(probabilities: torch.Tensor, row: SampleRow) -> int:
    """The index at which the cumulative distribution passes the row's uniform number."""
    cumulative = probabilities.double().cumsum(0)
    position = len(row.prompt) + len(row.generated)
    target = uniform(row.params.seed, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    return min(index, len(probabilities) - 1)
