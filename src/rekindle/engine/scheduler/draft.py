"""A step plan in the making."""

from __future__ import annotations

from rekindle.engine.scheduler.merging import MergeChoice
from rekindle.engine.scheduler.plan import AdapterLoad, PlannedSequence, StepPlan
from rekindle.engine.scheduler.sequence import Sequence
from rekindle.protocol.identity import AdapterDigest, RequestId


class StepDraft:
    """Collects what a step is to do. `timelines` holds each planned sequence with its timeline, in the plan's order.

    `is_short_of_pages` is set when a running sequence had to be preempted or held back for lack of pages.
    """

    def __init__(self, max_tokens: int) -> None:
        self.tokens_left = max_tokens
        self.timelines: list[tuple[Sequence, int]] = []
        self.loads: list[AdapterLoad] = []
        self.preempted: list[RequestId] = []
        self.reasons: list[str] = []
        self.is_short_of_pages = False
        self.merge = MergeChoice()
        self.planned: list[PlannedSequence] = []

    def add(self, sequence: Sequence, num_positions: int) -> None:
        """Plan a sequence's next positions, which its pages cover."""
        self.planned.append(sequence.plan(num_positions))
        self.timelines.append((sequence, sequence.timeline))
        self.tokens_left -= num_positions

    def build(self, step: int, evicted: tuple[AdapterDigest, ...]) -> StepPlan:
        return StepPlan(
            step=step,
            sequences=tuple(self.planned),
            loads=tuple(self.loads),
            evicted=evicted,
            preempted=tuple(self.preempted),
            reasons=(*self.reasons, *self.merge.reasons),
            merged=self.merge.merged,
            merge_build=self.merge.build,
        )
