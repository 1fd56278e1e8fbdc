"""When an adapter is merged into the weights: rent or buy, from measured times.

A step's *mode* is the adapter that is merged into its weights, or none. All rows share the batch in every mode, so
that merging delays nobody: rows of the merged adapter need no update, all others need one more, which takes it off. A
linear model, fitted to the measured times of the lora kernel, says how long a step's updates take in each mode.

A mode that costs nothing to enter is chosen step by step, with a margin against going back and forth. One that has to
be paid for first, by writing weights, is paid for once the steps that went without it have lost its price: at worst,
that is twice what knowing the future would have cost (ski rental; Karlin et al., "Competitive snoopy caching", 1988,
section 3). Losses fade with time, so that only lasting ones count. Prices are measured, too.

Weights are either *copies*, which are written while steps go on and are free to use or to leave once they are there,
or changed *in place*, where entering and leaving both cost. In place, a step without rows of the merged adapter always
leaves, since the adapter may be gone from memory, and with it what would take it off the others' rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

from rekindle.engine.scheduler.linear_model import LinearModel
from rekindle.engine.scheduler.plan import PlannedSequence
from rekindle.protocol.identity import AdapterDigest

_FIRST_GUESS = (1e-3, 1e-10, 1e-11)
_SCALES = (1.0, 1e7, 1e8)
"""Of passes, bytes and rows x bytes: see `MergePolicy._features`. The guess stands until steps were measured."""
_MARGIN = 0.1
"""Part of the time of a step's updates that another free mode must save to be preferred to the present one."""
_LOSS_MEMORY_S = 300.0
"""Time in which a loss fades to 1/e: what was lost much longer ago says little about the next minutes."""
_GIVE_UP = 0.5
"""A copy in the making is abandoned when the losses that ordered it have faded to this part of its price."""
_MAX_TRACKED = 64


@dataclass(frozen=True, slots=True)
class StepMix:
    """The rows of a step: those of each adapter, and all."""

    rows_of: Mapping[AdapterDigest, int]
    num_rows: int


@dataclass(frozen=True, slots=True)
class AdapterSize:
    """Bytes of an adapter: what its updates read, and the weights that are written to merge it."""

    lora_bytes: int
    merge_bytes: int


@dataclass(frozen=True, slots=True)
class MergeChoice:
    """The mode of a step, and the adapter that a copy is being made for."""

    merged: AdapterDigest | None = None
    build: AdapterDigest | None = None
    reasons: tuple[str, ...] = ()


class MergeState(Enum):
    """What became of an adapter's merged weights."""

    READY = auto()
    REFUSED = auto()
    DROPPED = auto()
    RESTORED = auto()


@dataclass(frozen=True, slots=True)
class MergeOutcome:
    """News of an adapter's merged weights. READY: writing `num_bytes` took `seconds`. REFUSED: they will not be, for
    `reason`. DROPPED: the copy is gone. RESTORED: the base's weights are back in their place, which took `seconds`."""

    digest: AdapterDigest
    state: MergeState
    seconds: float = 0.0
    num_bytes: int = 0
    reason: str = ""


def mix_of(sequences: Iterable[PlannedSequence]) -> StepMix:
    """The rows of planned sequences."""
    rows_of: dict[AdapterDigest, int] = {}
    num_rows = 0
    for planned in sequences:
        num_positions = planned.num_positions
        num_rows += num_positions
        digest = planned.request.adapter
        if digest is not None:
            rows_of[digest] = rows_of.get(digest, 0) + num_positions
    return StepMix(rows_of, num_rows)


class MergePolicy:
    """See the module. `write_s_per_byte` is the price of writing merged weights, and of restoring the base's, until
    it has been measured."""

    def __init__(self, write_s_per_byte: float, *, in_place: bool = False) -> None:
        self._write_s_per_byte = self._restore_s_per_byte = write_s_per_byte
        self._in_place = in_place
        self._times = LinearModel(_FIRST_GUESS, _SCALES)
        self._sizes: dict[AdapterDigest, AdapterSize] = {}
        self._ready: set[AdapterDigest] = set()
        self._refused: set[AdapterDigest] = set()
        self._losses: dict[AdapterDigest | None, tuple[float, float]] = {}
        self._building: AdapterDigest | None = None
        self.merged: AdapterDigest | None = None
        self.num_merged_steps = 0

    def add(self, digest: AdapterDigest, size: AdapterSize) -> None:
        """Make an adapter known."""
        self._sizes[digest] = size

    def remove(self, digest: AdapterDigest) -> None:
        """Forget an adapter; its rows, if there still are any, run unmerged."""
        self._sizes.pop(digest, None)
        self._losses.pop(digest, None)
        self._refused.discard(digest)
        self._ready.discard(digest)
        if self._building == digest:
            self._building = None

    def note_step(self, mix: StepMix, merged: AdapterDigest | None, lora_s: float) -> None:
        """The updates of a step of this mix and mode took `lora_s`."""
        if self._knows(mix) and (merged is None or merged in self._sizes):
            features = self._features(mix, merged)
            if features[0]:
                self._times.note(features, lora_s)

    def note_outcome(self, outcome: MergeOutcome) -> None:
        """Take notice of what became of merged weights."""
        digest = outcome.digest
        if outcome.state is MergeState.RESTORED:
            self._restore_s_per_byte = outcome.seconds / max(outcome.num_bytes, 1)
            return
        self._losses.pop(digest, None)
        if self._building == digest:
            self._building = None
        if outcome.state is MergeState.READY:
            self._ready.add(digest)
            self._write_s_per_byte = outcome.seconds / max(outcome.num_bytes, 1)
            return
        self._ready.discard(digest)
        if self.merged == digest:
            self.merged = None
        if outcome.state is MergeState.REFUSED:
            self._refused.add(digest)

    def lora_s(self, mix: StepMix, merged: AdapterDigest | None) -> float:
        """How long the updates of such a step are likely to take in this mode."""
        return self._times.predict(self._features(mix, merged))

    def choose(self, mix: StepMix, now_s: float) -> MergeChoice:
        """The mode of a step, which is about to run."""
        before = self.merged
        reasons: list[str] = []
        candidate = self._candidate(mix)
        self.merged = self._free_mode(mix, candidate)
        if self._in_place:
            self._switch_in_place(mix, candidate, now_s, reasons)
        else:
            self._order_copy(mix, candidate, now_s, reasons)
        if self.merged != before:
            saved_ms = (self.lora_s(mix, None) - self.lora_s(mix, self.merged)) * 1e3 if self.merged else 0.0
            what = f"{self.merged} is merged: that saves {saved_ms:.2f} ms" if self.merged else "nothing is merged"
            reasons.append(f"{what} in a step of this mix")
        self.num_merged_steps += self.merged is not None
        return MergeChoice(self.merged, self._building, tuple(reasons))

    def _features(self, mix: StepMix, merged: AdapterDigest | None) -> tuple[float, float, float]:
        """Of a step's updates: calls of the kernel per linear, bytes of the adapters read, and bytes x rows."""
        num_passes, num_bytes, work = 0, 0, 0
        for digest, num_rows in mix.rows_of.items():
            if digest != merged:
                num_passes = 1
                size = self._sizes[digest].lora_bytes
                num_bytes += size
                work += size * num_rows
        if merged is not None:
            num_others = mix.num_rows - mix.rows_of.get(merged, 0)
            if num_others:
                size = self._sizes[merged].lora_bytes
                num_passes += 1
                num_bytes += size
                work += size * num_others
        return num_passes, num_bytes, work

    def _knows(self, mix: StepMix) -> bool:
        return all(digest in self._sizes for digest in mix.rows_of)

    def _candidate(self, mix: StepMix) -> AdapterDigest | None:
        """The adapter that most of the step's updates are for, if it may be merged."""
        if not mix.rows_of or not self._knows(mix):
            return None
        digest = max(mix.rows_of, key=lambda it: mix.rows_of[it] * self._sizes[it].lora_bytes)
        return None if digest in self._refused else digest

    def _free_mode(self, mix: StepMix, candidate: AdapterDigest | None) -> AdapterDigest | None:
        """The best mode that costs nothing to enter."""
        present = self.merged if self.merged in mix.rows_of and self._knows(mix) else None
        if self._in_place:
            return present
        if present is not None and present not in self._ready:
            present = None
        modes = (None, candidate) if candidate in self._ready else (None,)
        best = min(modes, key=lambda mode: self.lora_s(mix, mode)) if self._knows(mix) else None
        if best != present and self.lora_s(mix, best) < (1 - _MARGIN) * self.lora_s(mix, present):
            return best
        return present

    def _switch_in_place(self, mix: StepMix, candidate: AdapterDigest | None, now_s: float, reasons: list[str]) -> None:
        if not self._knows(mix):
            return
        for mode in dict.fromkeys((None, candidate)):
            if mode == self.merged:
                continue
            lost_s = self._lose(mode, self.lora_s(mix, self.merged) - self.lora_s(mix, mode), now_s)
            if lost_s > self._leaving_price_s() + self._price_s(mode):
                reasons.append(f"weights are rewritten: steps of late lost {lost_s:.3f} s, which is more than it costs")
                self.merged = mode
                self._losses.clear()
                return

    def _order_copy(self, mix: StepMix, candidate: AdapterDigest | None, now_s: float, reasons: list[str]) -> None:
        if candidate is not None and candidate not in self._ready:
            saving_s = self.lora_s(mix, self.merged) - self.lora_s(mix, candidate)
            lost_s = self._lose(candidate, max(saving_s, 0.0), now_s)
            price_s = self._price_s(candidate)
            if self._building is None and lost_s > price_s:
                reasons.append(
                    f"{candidate} is to be merged: that would have saved {lost_s:.3f} s and costs {price_s:.3f} s"
                )
                self._building = candidate
        building = self._building
        if building is not None and self._lose(building, 0.0, now_s) < _GIVE_UP * self._price_s(building):
            reasons.append(f"{building} is not to be merged any more: too few rows are of it")
            self._building = None

    def _lose(self, mode: AdapterDigest | None, loss_s: float, now_s: float) -> float:
        """Add to what going without a mode has lost; returns the sum."""
        lost_s, then_s = self._losses.pop(mode, (0.0, now_s))
        lost_s = max(lost_s * math.exp((then_s - now_s) / _LOSS_MEMORY_S) + loss_s, 0.0)
        self._losses[mode] = (lost_s, now_s)
        if len(self._losses) > _MAX_TRACKED:
            del self._losses[min(self._losses.keys() - {self._building}, key=lambda it: self._losses[it][0])]
        return lost_s

    def _leaving_price_s(self) -> float:
        return 0.0 if self.merged is None else self._sizes[self.merged].merge_bytes * self._restore_s_per_byte

    def _price_s(self, mode: AdapterDigest | None) -> float:
        return 0.0 if mode is None else self._sizes[mode].merge_bytes * self._write_s_per_byte
