"""How long calls of the lora kernel take, by marks before and after each: readings of a clock, or CUDA events.

A GPU runs behind the host, so times of events are read once it has passed them and never waited for. A recorded step
contains its events, which get new times whenever it is replayed. To mark a call takes a GPU about a microsecond, so
that only some layers are marked there and count for the others, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from rekindle.clock import Clock


class Mark(Protocol):
    """A point among the computations of a device; `torch.cuda.Event` is one."""

    def record(self) -> object:
        """Put it after all that was submitted so far."""
        ...

    def query(self) -> bool:
        """Whether the device has passed it."""
        ...

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from this mark to another, both of which the device has passed."""
        ...


class ClockMark:
    """A mark of a device on which submitted work has been done."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.at_s = clock, 0.0

    def record(self) -> None:
        self.at_s = self._clock.monotonic_s()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: ClockMark, /) -> float:
        return (end.at_s - self.at_s) * 1e3


@dataclass(frozen=True, slots=True)
class Span:
    """One marked call, which counts for `weight` calls."""

    begin: Mark
    end: Mark
    weight: float


Spans = tuple[Span, ...]
"""Marked calls in the order in which they were submitted."""


class LoraTimer:
    """Marks the calls in up to `max_layers` layers, evenly spread, and in the output head, which counts as the layer
    after the last one."""

    def __init__(self, make_mark: Callable[[], Mark], num_layers: int, max_layers: int) -> None:
        self._make_mark = make_mark
        layers = range(0, num_layers, -(-num_layers // max_layers))
        self._weights = {**dict.fromkeys(layers, num_layers / len(layers)), num_layers: 1.0}
        self._spans: list[Span] = []

    def run(self, layer: int, call: Callable[[], None]) -> None:
        """Make a call."""
        weight = self._weights.get(layer)
        if weight is None:
            call()
            return
        span = Span(self._make_mark(), self._make_mark(), weight)
        span.begin.record()
        call()
        span.end.record()
        self._spans.append(span)

    def add(self, spans: Spans) -> None:
        """Take note of calls that a recorded step has just made again."""
        self._spans += spans

    def take(self) -> Spans:
        """The calls since the last time."""
        spans, self._spans = tuple(self._spans), []
        return spans


def elapsed_s(spans: Spans) -> float | None:
    """Seconds of these calls; None as long as the device has not made them all."""
    if not all(span.begin.query() and span.end.query() for span in spans):
        return None
    return sum(span.weight * span.begin.elapsed_time(span.end) for span in spans) / 1e3
