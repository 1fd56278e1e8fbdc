"""What a draw is, and the choice of tokens on a CPU.

A draw sees the tokens from the likeliest to the least, equals by rising id. A token's distance is the highest logit
less its own, its weight exp(-distance / temperature), so that the likeliest weighs 1. Filters keep a first stretch of
that order: top_k so many tokens, min_p those of at least that weight, top_p the fewest whose weights add up to that
share of what the other two have left. The token is the one at which the running sum of the weights kept passes
`uniform` times the whole. Without filters no order is needed and the sum runs in the order of ids.
`kernels.gpu.sampling` does the same on a GPU.

Suffixes: R rows, V vocabulary, B bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

NOT_FINITE = -1
"""In place of a token: the row's highest logit is not a finite number."""

_FLOATS = npt.NDArray[np.float32]
_SUMS = npt.NDArray[np.float64]
_IDS = npt.NDArray[np.intp]

_GROUP = 128
"""Tokens that are summed, or searched for the nearest one, as one."""

_LIKELY = 256
"""How many of the likeliest tokens are looked at before all are: top_p rarely keeps more."""

_BINS = 2048
_BINNED_NATS = 32.0
"""Tokens are told apart by bins up to this logarithm of weight; what is less likely shares the last bin."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Settings of one draw, as in `SamplingParams`, with a temperature above 0, and its number in [0, 1)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float

    @property
    def has_filters(self) -> bool:
        """Whether any token may be ruled out."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0


Choose = Callable[[torch.Tensor, Sequence[Draw | None]], Callable[[], list[int]]]
"""Starts choosing a token for each row of float32 logits: by its draw, or the likeliest where that is None. What this
returns waits for the tokens; see `NOT_FINITE`."""


def choose_on_cpu(logits_RV: torch.Tensor, draws: Sequence[Draw | None]) -> Callable[[], list[int]]:
    """See `Choose`."""
    rows_RV = logits_RV.numpy()
    likeliest_R = rows_RV.argmax(axis=1)  # the lowest id among equals, and NaN before any number
    finite_R = np.isfinite(rows_RV[np.arange(len(rows_RV)), likeliest_R])
    token_ids = [int(token_id) if ok else NOT_FINITE for token_id, ok in zip(likeliest_R, finite_R, strict=True)]
    for row, draw in enumerate(draws):
        if draw is not None and finite_R[row]:
            token_ids[row] = _drawn(rows_RV[row], likeliest_R[row], draw)
    return lambda: token_ids


def _drawn(logits_V: _FLOATS, likeliest: int, draw: Draw) -> int:
    rate = np.float32(-1.0 / draw.temperature)
    with np.errstate(over="ignore"):  # an infinite distance is right: its weight is 0
        distance_V = logits_V[likeliest] - logits_V
        if not draw.has_filters:
            return _in_order_of_ids(np.exp(distance_V * rate), draw.uniform)
        if draw.min_p > 0.0:
            near = np.flatnonzero(distance_V <= draw.temperature * (1e-5 - math.log(draw.min_p) * (1.0 + 1e-5)))
        elif draw.top_k:
            near = _nearest(distance_V, draw.top_k)
        else:
            weight_V = np.exp(distance_V * rate)
            total = float(weight_V.sum(dtype=np.float64))
            near = _nearest(distance_V, _LIKELY)
            if weight_V[near].sum(dtype=np.float64) < draw.top_p * total:
                return _kept(_Ranking(None, distance_V, weight_V, draw.temperature), total, draw)
            return _kept(_Ranking(near, distance_V[near], weight_V[near], draw.temperature), total, draw)
        distance = distance_V[near]
        weight = np.exp(distance * rate)
    ranking = _Ranking(near, distance, weight, draw.temperature)
    count = min(draw.top_k or len(near), int(np.count_nonzero(weight >= draw.min_p)))
    return _kept(ranking, ranking.mass_of(count), draw)


def _kept(ranking: _Ranking, mass: float, draw: Draw) -> int:
    """The draw among the first tokens of that mass, or those of them that top_p keeps."""
    if draw.top_p < 1.0:
        mass = ranking.mass_reaching(draw.top_p * mass)
    return ranking.token_at(draw.uniform * mass)


def _in_order_of_ids(weight_V: _FLOATS, uniform: float) -> int:
    starts = np.arange(0, len(weight_V), _GROUP)
    group_sums = np.add.reduceat(weight_V, starts, dtype=np.float64).cumsum()
    target = uniform * group_sums[-1]
    group = _first_past(group_sums, target)
    start = starts[group]
    before = group_sums[group - 1] if group else 0.0
    return int(start) + _first_past(weight_V[start : start + _GROUP].cumsum(dtype=np.float64), target - before)


def _nearest(distance_V: _FLOATS, count: int) -> _IDS:
    """Ids, rising, of the `count` tokens at the least distance and a few more.

    The group at rank `count` of the groups by their least distance bounds that of the token at that rank.
    """
    size = max(1, min(_GROUP, len(distance_V) // (4 * count)))
    least = np.minimum.reduceat(distance_V, np.arange(0, len(distance_V), size))
    if count >= len(least):
        return np.arange(len(distance_V))
    return np.flatnonzero(distance_V <= np.partition(least, count - 1)[count - 1])


def _first_past(sums: _SUMS, target: float) -> int:
    """Index of the first of these running sums above the target; where rounding leaves none, of the last that rose."""
    return int(np.searchsorted(sums, min(target, np.nextafter(sums[-1], 0.0)), side="right"))


class _Ranking:
    """Tokens from the likeliest to the least, equals by id, with the running sum of their weights.

    Only bins of tokens of nearly equal weight are kept in order; a bin is sorted when the answer lies in it.
    """

    def __init__(self, ids: _IDS | None, distance: _FLOATS, weight: _FLOATS, temperature: float) -> None:
        """`ids` rise; None says that no token was left out."""
        self._ids, self._distance, self._weight = ids, distance, weight
        with np.errstate(over="ignore"):
            place = distance * np.float32(_BINS / (_BINNED_NATS * temperature))
        self._bin = np.minimum(place, np.float32(_BINS - 1), out=place).astype(np.int16)
        self._mass_to_B = np.bincount(self._bin, weight, _BINS).cumsum()

    def mass_of(self, count: int) -> float:
        """Sum of the weights of the first `count` tokens."""
        count_to_B = np.bincount(self._bin, minlength=_BINS).cumsum()
        place = int(np.searchsorted(count_to_B, count, side="left"))
        before = int(count_to_B[place - 1]) if place else 0
        return float(self._sorted(place)[1][count - before - 1])

    def mass_reaching(self, mass: float) -> float:
        """The least sum of the weights of first tokens that is not under `mass`."""
        sums = self._sorted(min(int(np.searchsorted(self._mass_to_B, mass, side="left")), self._last_bin()))[1]
        return float(sums[min(int(np.searchsorted(sums, mass, side="left")), len(sums) - 1)])

    def token_at(self, mass: float) -> int:
        """The first token with which the running sum passes `mass`."""
        ids, sums = self._sorted(_first_past(self._mass_to_B, mass))
        return int(ids[_first_past(sums, mass)])

    def _last_bin(self) -> int:
        return int(self._bin.max())

    def _sorted(self, place: int) -> tuple[_IDS, _SUMS]:
        """The tokens of one bin and the running sums at them."""
        members = np.flatnonzero(self._bin == place)
        members = members[np.argsort(self._distance[members], kind="stable")]
        before = self._mass_to_B[place - 1] if place else 0.0
        return members if self._ids is None else self._ids[members], before + self._weight[members].cumsum(
            dtype=np.float64
        )
