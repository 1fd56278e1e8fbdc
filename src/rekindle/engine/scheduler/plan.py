"""The one record between scheduler and runner, and the one that comes back."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import GenerateRequest, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest, RequestId


@dataclass(frozen=True, slots=True)
class PlannedSequence:
    """Positions `start .. start + len(token_ids) + num_placeholders` of one sequence are computed in this step.

    `token_ids` are the known tokens at those positions; the `num_placeholders` positions after them take tokens that
    an earlier step, planned but not yet committed, is still to sample: the runner fills in its own latest samples.
    If `samples`, the token after the last position is chosen. `pages` is the sequence's page table, which covers the
    last position. `history` are the tokens after the prompt known so far; the runner reads it when sampling needs it.
    `wants_prompt_logprobs` asks for log-probabilities of the prompt tokens that follow each computed position.
    """

    request: GenerateRequest
    start: int
    token_ids: tuple[int, ...]
    num_placeholders: int
    samples: bool
    pages: tuple[int, ...]
    history: Seq[int]
    wants_prompt_logprobs: bool = False

    @property
    def num_positions(self) -> int:
        return len(self.token_ids) + self.num_placeholders


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Read an adapter from its file into `pages`, beside the running steps; report with `Scheduler.adapter_loaded`."""

    manifest: AdapterManifest
    path: str
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does. Order of acting: `evicted` adapters are unmapped, `loads` are started, the sequences run.

    `preempted` gave their pages back and wait again; `reasons` say in words why anything unusual was decided.
    An empty `sequences` means there is nothing to compute now. `merged` names the adapter whose rows find it in the
    weights, `merge_build` the one that is to be made ready for that; see `merging`.
    """

    step: int
    sequences: tuple[PlannedSequence, ...] = ()
    loads: tuple[AdapterLoad, ...] = ()
    evicted: tuple[AdapterDigest, ...] = ()
    preempted: tuple[RequestId, ...] = ()
    reasons: tuple[str, ...] = ()
    merged: AdapterDigest | None = None
    merge_build: AdapterDigest | None = None

    @property
    def num_tokens(self) -> int:
        return sum(planned.num_positions for planned in self.sequences)


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What the step gave one planned sequence, in the plan's order.

    `token_ids` are the sampled tokens (empty if it does not sample; speculative steps may give several).
    `num_accepted` positions of the planned range hold valid KV; it may be fewer than planned. `error` ends the
    sequence with that message and leaves the others alone.
    """

    token_ids: tuple[int, ...] = ()
    num_accepted: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a plan's sequences, in its order."""

    step: int
    sequences: tuple[SequenceResult, ...] = field(default=())
