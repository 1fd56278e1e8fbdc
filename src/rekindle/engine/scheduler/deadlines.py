"""Which waiting sequences can no longer give their first token in time (S-LoRA, section 4.2: early abort).

The estimate goes through the queue in the order of turns. What stands between a sequence and its first token is the
prompt tokens of the running sequences and of those before it, at the rate of the fitted step times, and, where the
batch is full, as many departures as there are sequences in front of it. Those given up make room for those behind, and
so are left out of what these wait for. A sequence whose adapter is not there begins when it is: loads under way and
those of the sequences before it come first, one after another. It stands before nobody whose first token would come
sooner. A sequence that nothing stands before is tried as long as it has time left: what it takes is what the estimate
learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from rekindle.engine.scheduler.adapters import AdapterCache, Residency
from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.sequence import Sequence
from rekindle.engine.scheduler.step_times import StepTimes
from rekindle.engine.scheduler.waiting import LONGEST_WAIT_S, SHORTEST_WAIT_S
from rekindle.errors import DeadlineUnreachable
from rekindle.protocol.generation import FinishReason, Refusal, TokenChunk


@dataclass(frozen=True, slots=True)
class Late:
    """A sequence that would take `expected_s` more seconds to its first token and has `left_s` for it."""

    sequence: Sequence
    expected_s: float
    left_s: float

    def chunk(self) -> TokenChunk:
        """The sequence's last chunk, which says so."""
        return self.sequence.chunk(
            reason=FinishReason.ERROR,
            error=(
                f"the first token would take about {self.expected_s:.3g} s more, and {max(self.left_s, 0.0):.3g} s are "
                f"left of the {self.sequence.request.ttft_slo_s:g} s that ttft_slo_ms allows; try again later, or "
                "allow more"
            ),
            refusal=Refusal(
                DeadlineUnreachable.__name__,
                retry_after_s=min(max(self.expected_s - self.left_s, SHORTEST_WAIT_S), LONGEST_WAIT_S),
            ),
        )


def deadline_s(sequence: Sequence) -> float | None:
    """When a waiting sequence's first token is due; None if it has all the time. Sequences that are resumed were
    accepted before and have."""
    limit_s = sequence.request.ttft_slo_s
    if limit_s is None or len(sequence.tokens) > sequence.num_prompt or sequence.request.epoch:
        return None
    return sequence.waiting_since_s + limit_s - sequence.request.waited_s


class LoadForecast:
    """Seconds until the adapters of sequences that are gone through in the order of their turns will be there."""

    def __init__(self, adapters: AdapterCache, now_s: float) -> None:
        self._adapters = adapters
        self._ready_s = adapters.loads.seconds_left(now_s)
        self._all_s = max(self._ready_s.values(), default=0.0)

    def seconds(self, sequence: Sequence) -> float:
        """For a sequence whose turn comes next."""
        digest = sequence.request.adapter
        if digest is None or self._adapters.residency(digest) is Residency.READY:
            return 0.0
        return self._ready_s.get(digest, self._all_s + self._adapters.load_s(digest))

    def pass_over(self, sequence: Sequence) -> None:
        """The sequence's adapter is loaded before those that are asked for from now on."""
        ready_s, digest = self.seconds(sequence), sequence.request.adapter
        if ready_s and digest is not None:
            self._ready_s[digest] = ready_s
            self._all_s = max(self._all_s, ready_s)


class FirstTokenEstimate:
    """Seconds to the first token of sequences that are gone through in the order of their turns."""

    def __init__(
        self, config: SchedulerConfig, times: StepTimes, running: Collection[Sequence], departure_interval_s: float
    ) -> None:
        self._config, self._times = config, times
        self._departure_interval_s = min(departure_interval_s, LONGEST_WAIT_S)
        self.is_first = not running
        self._num_decodes = sum(sequence.num_plannable <= 1 for sequence in running)
        self._num_prompt_tokens = sum(sequence.num_plannable for sequence in running if sequence.num_plannable > 1)
        self._num_free = config.max_sequences - len(running)
        self._awaiting: list[tuple[float, int]] = []

    def seconds(self, num_own_tokens: int, ready_s: float = 0.0) -> float:
        """For a sequence whose turn comes next, that has so many tokens to compute and an adapter in `ready_s`."""
        while self._awaiting and self._awaiting[0][0] <= self._turn_s(num_own_tokens):
            self._count(heappop(self._awaiting)[1])
        return max(self._turn_s(num_own_tokens), ready_s + self._prefill_s(num_own_tokens))

    def pass_over(self, sequence: Sequence, ready_s: float = 0.0) -> None:
        """The sequence runs before those that are asked for from now on, or as soon as its adapter is there."""
        self.is_first = False
        if ready_s:
            heappush(self._awaiting, (ready_s, len(sequence.tokens)))
        else:
            self._count(len(sequence.tokens))

    def _count(self, num_tokens: int) -> None:
        self._num_prompt_tokens += num_tokens
        self._num_free -= 1

    def _turn_s(self, num_own_tokens: int) -> float:
        num_departures = max(1 - self._num_free, 0)
        return self._prefill_s(self._num_prompt_tokens + num_own_tokens) + num_departures * self._departure_interval_s

    def _prefill_s(self, num_tokens: int) -> float:
        num_tokens_a_step = max(self._config.max_step_tokens - self._num_decodes, 1)
        step_s = self._times.step_s(0, self._num_decodes)
        return -(-num_tokens // num_tokens_a_step) * step_s + self._times.prompt_token_s * num_tokens


def late_sequences(
    turns: Iterable[Sequence],
    estimate: FirstTokenEstimate,
    loads: LoadForecast,
    num_cached: Callable[[Sequence], int],
    now_s: float,
) -> list[Late]:
    """Those of the waiting sequences, given in turn, that have a deadline and would miss it. `num_cached` tells how
    many tokens of a sequence need not be computed."""
    late = []
    for sequence in turns:
        due_s, ready_s = deadline_s(sequence), loads.seconds(sequence)
        if due_s is not None:
            left_s = due_s - now_s
            expected_s = estimate.seconds(len(sequence.tokens), ready_s)
            if expected_s > left_s:
                expected_s = estimate.seconds(len(sequence.tokens) - num_cached(sequence), ready_s)
            if expected_s > left_s and not (estimate.is_first and left_s > 0):
                late.append(Late(sequence, expected_s, left_s))
                continue
        estimate.pass_over(sequence, ready_s)
        loads.pass_over(sequence)
    return late
