"""How long bringing an object takes, stage by stage: fixed + bytes / rate, fitted to what was measured, with its error.

The fit is that of least absolute errors of the logarithm: 10% too much and 10% too little weigh alike whatever the
size, and a load that met a busy machine, or a file in the page cache, weighs no more than any other. One parameter is
how many bytes the fixed part is worth; given it, the rate is a weighted median and exact. So nothing is ever
negative, and while all objects are of one size the two parts keep the ratio of the first guess.

The latest observations are kept, not sums over all, and each weighs `_FADING` times the one after it: after a change of
the device's speed, nine observations outweigh all earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple, Self

import msgspec

from rekindle.protocol.estimates import StageEstimate

WINDOW = 32
"""Observations of a stage that are kept."""
MAX_STAGES = 64

_FADING = 0.92
_WEIGHTS = tuple(_FADING ** (WINDOW - 1 - i) for i in range(WINDOW))

_LEAST_S, _MOST_S = 1e-6, 3600.0
_MOST_BYTES = 1 << 60
_LEAST_BYTES_PER_S, _MOST_BYTES_PER_S = 1e4, 1e13
"""No load is faster or slower than this, whatever a clock says."""

_LEAST_FIXED_BYTES, _MOST_FIXED_BYTES = 1e3, 1e11
_GRID = tuple(_LEAST_FIXED_BYTES * 32.0**i for i in range(6))
_STEPS = (4.0, 2.0, 2**0.25)
"""Where the search for what the fixed part is worth looks first, and by which factors it goes on from the best."""
_INERTIA = 0.02
"""What the search must gain for each factor of e, so that noise moves nothing while all objects are of one size."""
_WORST = 2.0
"""An observation that is off by a factor of e ** 2 or more is one of something else, and how far it is off is nothing
to go by."""


class Observation(msgspec.Struct, frozen=True, array_like=True):
    """Something of `num_bytes` took `seconds`, and `predicted_s` were expected."""

    num_bytes: int
    seconds: float
    predicted_s: float

    @property
    def error(self) -> float:
        return abs(self.predicted_s - self.seconds) / self.seconds


class StageModel(msgspec.Struct):
    """One stage: fixed_s + bytes / bytes_per_s, which are a first guess to begin with, and what they rest on. A record
    that can be sent and stored as it is."""

    stage: str
    fixed_s: float = 0.002
    bytes_per_s: float = 1e9
    num_observations: int = 0
    recent: list[Observation] = []

    def seconds(self, num_bytes: int) -> float:
        """How long so many bytes are likely to take."""
        return self.fixed_s + min(max(num_bytes, 0), _MOST_BYTES) / self.bytes_per_s

    def observe(self, num_bytes: int, seconds: float) -> None:
        """So many bytes took that long."""
        if math.isnan(seconds):
            return
        num_bytes = min(max(num_bytes, 0), _MOST_BYTES)
        seconds = min(max(seconds, _LEAST_S), _MOST_S)
        self.recent.append(Observation(num_bytes, seconds, self.seconds(num_bytes)))
        del self.recent[:-WINDOW]
        self.num_observations += 1
        self._fit()

    def estimate(self) -> StageEstimate:
        """What is known by now."""
        error = median(it.error for it in self.recent) if self.recent else None
        bytes_per_s = self.bytes_per_s if any(it.num_bytes for it in self.recent) else None
        return StageEstimate(self.stage, self.fixed_s, bytes_per_s, self.num_observations, error)

    def _fit(self) -> None:
        points = [
            _Point(float(it.num_bytes), math.log(it.seconds), weight)
            for it, weight in zip(self.recent, _WEIGHTS[-len(self.recent) :], strict=True)
        ]
        fixed_bytes = min(max(self.fixed_s * self.bytes_per_s, _LEAST_FIXED_BYTES), _MOST_FIXED_BYTES)
        line = _search(points, fixed_bytes)
        self.bytes_per_s = min(max(math.exp(-line.log_s_per_byte), _LEAST_BYTES_PER_S), _MOST_BYTES_PER_S)
        self.fixed_s = min(math.exp(line.log_s_per_byte) * line.fixed_bytes, _MOST_S)


class LoadEstimates:
    """The stages of one machine or engine, those given and those observed; when there are too many, the one longest
    without an observation is forgotten."""

    def __init__(self, stages: Iterable[StageModel] = ()) -> None:
        self._stages = {model.stage: model for model in stages}

    @classmethod
    def guessed(cls, known: Iterable[StageEstimate]) -> Self:
        """What was known elsewhere is a first guess here."""
        return cls(StageModel(it.stage, it.fixed_s, it.bytes_per_s) for it in known if it.bytes_per_s is not None)

    def __getitem__(self, stage: str) -> StageModel:
        return self._stages.get(stage) or StageModel(stage)

    def seconds(self, path: Iterable[tuple[str, int]]) -> float:
        """How long it is likely to take to bring an object through stages one after another, so many bytes each."""
        return sum(self[stage].seconds(num_bytes) for stage, num_bytes in path)

    def observe(self, stage: str, num_bytes: int, seconds: float) -> None:
        """Bringing so many bytes through the stage took that long."""
        model = self[stage]
        model.observe(num_bytes, seconds)
        self._stages.pop(stage, None)
        self._stages[stage] = model
        if len(self._stages) > MAX_STAGES:
            del self._stages[next(iter(self._stages))]

    def snapshot(self) -> tuple[StageEstimate, ...]:
        """All stages, by name."""
        return tuple(self._stages[stage].estimate() for stage in sorted(self._stages))


class _Point(NamedTuple):
    num_bytes: float
    log_s: float
    weight: float


class _Line(NamedTuple):
    misfit: float
    fixed_bytes: float
    log_s_per_byte: float


def _search(points: list[_Point], start: float) -> _Line:
    """The best line, by how many bytes its fixed part is worth: that of `start` where others are no better."""
    best = _line(points, start, start)
    for fixed_bytes in _GRID:
        best = min(best, _line(points, fixed_bytes, start))
    for step in _STEPS:
        for factor in (step, 1 / step):
            while _LEAST_FIXED_BYTES <= (fixed_bytes := best.fixed_bytes * factor) <= _MOST_FIXED_BYTES:
                line = _line(points, fixed_bytes, start)
                if line.misfit >= best.misfit:
                    break
                best = line
    return best


def _line(points: list[_Point], fixed_bytes: float, start: float) -> _Line:
    """The best line whose fixed part is worth so many bytes; `misfit` is the sum of its errors."""
    ratios = sorted([(log_s - math.log(fixed_bytes + num_bytes), weight) for num_bytes, log_s, weight in points])
    middle = _weighted_median(ratios)
    misfit = sum([weight * min(abs(ratio - middle), _WORST) for ratio, weight in ratios])
    return _Line(misfit + _INERTIA * abs(math.log(fixed_bytes / start)), fixed_bytes, middle)


def _weighted_median(ordered: list[tuple[float, float]]) -> float:
    rest = sum([weight for _, weight in ordered]) / 2
    for value, weight in ordered:
        rest -= weight
        if rest <= 0:
            return value
    return ordered[-1][0]
