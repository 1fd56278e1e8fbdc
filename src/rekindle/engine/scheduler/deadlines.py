"""Which waiting sequences can no longer give their first token in time (S-LoRA, section 4.2: early abort).

The estimate goes through the queue in the order of turns. What stands between a sequence and its first token is the
prompt tokens of the running sequences and of those before it, at the rate of the fitted step times, and, where the
batch is full, as many departures as there are sequences in front of it. Those given up make room for those behind, and
so are left out of what these wait for. The time that an absent adapter takes to load is not in it. A sequence that
nothing stands before is tried as long as it has time left: what it takes is what the estimate learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

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

    def seconds(self, num_own_tokens: int) -> float:
        """For a sequence whose turn comes next and that has so many tokens to compute."""
        num_tokens = self._num_prompt_tokens + num_own_tokens
        num_tokens_a_step = max(self._config.max_step_tokens - self._num_decodes, 1)
        num_steps = -(-num_tokens // num_tokens_a_step)
        step_s = self._times.step_s(0, self._num_decodes)
        prompt_s = self._times.step_s(num_tokens, self._num_decodes) - step_s
        return num_steps * step_s + prompt_s + max(1 - self._num_free, 0) * self._departure_interval_s

    def pass_over(self, sequence: Sequence) -> None:
        """The sequence runs before those that are asked for from now on."""
        self._num_prompt_tokens += len(sequence.tokens)
        self._num_free -= 1
        self.is_first = False


def late_sequences(
    turns: Iterable[Sequence], estimate: FirstTokenEstimate, num_cached: Callable[[Sequence], int], now_s: float
) -> list[Late]:
    """Those of the waiting sequences, given in turn, that have a deadline and would miss it. `num_cached` tells how
    many tokens of a sequence need not be computed. Sequences that are resumed were accepted before and stay."""
    late = []
    for sequence in turns:
        limit_s = sequence.request.ttft_slo_s
        if limit_s is not None and len(sequence.tokens) == sequence.num_prompt and not sequence.request.epoch:
            left_s = limit_s - (now_s - sequence.waiting_since_s)
            expected_s = estimate.seconds(len(sequence.tokens))
            if expected_s > left_s:
                expected_s = estimate.seconds(len(sequence.tokens) - num_cached(sequence))
            if expected_s > left_s and not (estimate.is_first and left_s > 0):
                late.append(Late(sequence, expected_s, left_s))
                continue
        estimate.pass_over(sequence)
    return late
