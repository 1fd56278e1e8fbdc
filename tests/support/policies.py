"""Policies that do what a test says."""

from __future__ import annotations

from rekindle.engine.scheduler.merging import MergeChoice, MergeOutcome, MergePolicy, MergeState, StepMix
from rekindle.protocol.identity import AdapterDigest


class ToldPolicy(MergePolicy):
    """Merges `target` in every step that has rows of it, once it is ready; keeps the news it gets."""

    def __init__(self, write_s_per_byte: float = 0.0, *, in_place: bool = False) -> None:
        super().__init__(write_s_per_byte, in_place=in_place)
        self.target: AdapterDigest | None = None
        self.news: list[MergeOutcome] = []

    def note_outcome(self, outcome: MergeOutcome) -> None:
        super().note_outcome(outcome)
        self.news.append(outcome)

    def choose(self, mix: StepMix, now_s: float) -> MergeChoice:
        latest = {outcome.digest: outcome.state for outcome in self.news}.get(self.target or AdapterDigest(""))
        is_ready = latest is not MergeState.REFUSED if self._in_place else latest is MergeState.READY
        self.merged = self.target if is_ready and self.target in mix.rows_of else None
        self.num_merged_steps += self.merged is not None
        is_wanted = not self._in_place and latest in (None, MergeState.DROPPED)
        return MergeChoice(self.merged, self.target if is_wanted else None)
