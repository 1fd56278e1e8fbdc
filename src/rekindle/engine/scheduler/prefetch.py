"""Loads of adapters for sequences whose turn has not come: while the batch is full, or while pages are short.

They are begun in the order of turns, no more than `MAX_LOADS` at a time, for the sequences next in turn. They take
free pages, and those of idle things worth less than the load; never an adapter that another sequence waits for. What
they have loaded is kept for its sequence: it is evicted only for a sequence whose turn comes sooner or for one that
runs, when nothing else is left.

A load cannot be called off, so its pages are out of reach until it ends. Those that the running sequences will ask
for in that time are left: an estimate, with the load taken to last `_SAFETY` times as long as expected.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from rekindle.engine.scheduler.adapters import Residency
from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.draft import StepDraft
from rekindle.engine.scheduler.eviction import warmth_of_rate
from rekindle.engine.scheduler.memory import PageMemory
from rekindle.engine.scheduler.sequence import Sequence
from rekindle.engine.scheduler.step_times import StepTimes

MAX_LOADS = 2
"""Loads under way beyond which none is begun ahead: one that runs and one to follow it without a pause. A load that
cannot wait has no more than these before it."""

MAX_LOOKED_AT = 64
"""Sequences next in turn that loads may be begun for."""

_USES_PER_S = 0.1
"""What a waiting sequence is to its adapter's chance of use: one use within ten seconds."""

_SAFETY = 4.0
_SHORTEST_STEP_S = 1e-4


class LoadsAhead:
    """Loads begun ahead in one step."""

    def __init__(
        self, config: SchedulerConfig, memory: PageMemory, times: StepTimes, draft: StepDraft, now_s: float
    ) -> None:
        self._config, self._memory, self._times = config, memory, times
        self._draft, self._now_s = draft, now_s
        self._num_looked_at = 0
        self._is_over = False

    def begin(self, turns: Iterable[Sequence], holders: Collection[Sequence]) -> None:
        """Begin loads for the given sequences, next in turn, while `holders` run."""
        for sequence in turns:
            self._num_looked_at += 1
            if self._is_over or self._num_looked_at > MAX_LOOKED_AT or not self._begin_one(sequence, holders):
                self.end()
                return

    def end(self) -> None:
        """Begin no more: what becomes free is for a sequence that lacks it."""
        self._is_over = True

    def _begin_one(self, sequence: Sequence, holders: Collection[Sequence]) -> bool:
        """False if no load may be begun for this sequence, and so for none behind it."""
        adapters, digest = self._memory.adapters, sequence.request.adapter
        if digest is None or adapters.residency(digest) is not Residency.ABSENT:
            return True
        if adapters.loads.num_under_way >= MAX_LOADS:
            return False
        num_pages = adapters.num_pages_of(digest)
        load_s = adapters.seconds_to_load(digest, self._now_s)
        if num_pages + self._num_growing_pages(holders, load_s) > self._memory.num_available():
            return False
        value = adapters.value(digest, warmth_of_rate(_USES_PER_S, self._now_s))
        pages = self._memory.allocate(num_pages, most_value=value, in_a_row=True)
        if pages is None:
            return False
        self._draft.loads.append(adapters.begin_load(digest, pages, self._now_s))
        self._draft.reasons.append(f"adapter {digest} is loaded ahead of its turn for {sequence.request.request_id}")
        return True

    def _num_growing_pages(self, holders: Collection[Sequence], load_s: float) -> int:
        """Pages that running sequences will ask for until the load has ended."""
        step_s = max(self._times.step_s(0, len(holders)), _SHORTEST_STEP_S)
        num_steps = math.ceil(_SAFETY * load_s / step_s) + 1
        ends = (min(sequence.num_planned + num_steps, sequence.max_positions) for sequence in holders)
        return sum(
            max(self._config.pages_for_tokens(end) - len(sequence.pages), 0)
            for end, sequence in zip(ends, holders, strict=True)
        )
