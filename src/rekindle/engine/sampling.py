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


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row to sample: its settings, the prompt and the tokens generated so far, which fix the draw's position."""

    params: SamplingParams
    prompt: Sequence[int]
    generated: Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token, and its log-probability with alternatives if they were asked for.

    `is_finite` is False if the model's output for this row holds NaN or infinity: the token means nothing then.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    is_finite: bool = True


def sample(logits_RV: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose one token for each row of float32 logits, which are left unchanged."""
    best_R = logits_RV.max(-1)
    token_ids = best_R.indices.tolist()
    finite = best_R.values.isfinite().tolist()
    if all(_is_plain_greedy(row) for row in rows):
        return [Sampled(token_id, None, ok) for token_id, ok in zip(token_ids, finite, strict=True)]
    return [
        _choose(logits_RV[r], row, token_ids[r]) if finite[r] else Sampled(token_ids[r], None, is_finite=False)
        for r, row in enumerate(rows)
    ]


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
    return params.temperature == 0 and params.logprobs is None and not params.changes_logits and not _forbids_stop(row)


def _choose(logits_V: torch.Tensor, row: SampleRow, likeliest: int) -> Sampled:
    """One row; `likeliest` is the argmax of its unchanged logits."""
    params = row.params
    adjusted_V = _adjusted(logits_V, row)
    if params.temperature > 0:
        token_id = _draw(adjusted_V, row)
    else:
        token_id = likeliest if adjusted_V is logits_V else int(adjusted_V.argmax())
    if params.logprobs is None:
        return Sampled(token_id)
    return Sampled(token_id, logprobs_of(logits_V.unsqueeze(0), [token_id], params.logprobs)[0])


def _adjusted(logits_V: torch.Tensor, row: SampleRow) -> torch.Tensor:
    """Logits after biases, penalties and the ban on early stops; the same tensor if there are none."""
    if not (row.params.changes_logits or _forbids_stop(row)):
        return logits_V
    adjusted_V = logits_V.clone()
    _apply_penalties(adjusted_V, row)
    if _forbids_stop(row):
        adjusted_V[list(row.params.stop_token_ids)] = -torch.inf
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
    for token_id, bias in params.logit_bias:
        logits_V[token_id] += bias


def _draw(logits_V: torch.Tensor, row: SampleRow) -> int:
    """Inverse-CDF draw after temperature, then top_k, top_p and min_p in that order (as in transformers)."""
    params = row.params
    probabilities_V = (logits_V / params.temperature).softmax(-1)
    if params.top_k == 0 and params.top_p >= 1.0 and params.min_p == 0.0:
        return _inverse_cdf(probabilities_V, row)
    values, token_ids = _truncated(probabilities_V, params)
    return int(token_ids[_inverse_cdf(values, row)])


def _truncated(probabilities_V: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept tokens' probabilities (not renormalised), most likely first, and their ids."""
    vocabulary = len(probabilities_V)
    values, token_ids = probabilities_V.topk(min(params.top_k or _CANDIDATES, vocabulary))
    if params.top_k:
        values = values / values.sum()
    elif not _covers(values, params):
        values, token_ids = probabilities_V.topk(vocabulary)
    if params.top_p < 1.0:
        mass_before = values.double().cumsum(0) - values
        values = values[mass_before < params.top_p]
    if params.min_p > 0.0:
        values = values[values >= params.min_p * values[0]]
    return values, token_ids[: len(values)]


def _covers(values: torch.Tensor, params: SamplingParams) -> bool:
    """Whether the most likely tokens, given in falling order, hold all that top_p or min_p would keep."""
    by_top_p = params.top_p < 1.0 and float(values.sum(dtype=torch.float64)) >= params.top_p
    by_min_p = bool(values[-1] < params.min_p * values[0])
    return by_top_p or by_min_p


def _inverse_cdf(probabilities: torch.Tensor, row: SampleRow) -> int:
    """The index at which the cumulative distribution passes the row's uniform number."""
    cumulative = probabilities.double().cumsum(0)
    position = len(row.prompt) + len(row.generated)
    target = uniform(row.params.seed, position) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    return min(index, len(probabilities) - 1)
