"""Which waiting sequences join the batch, and which adapters are loaded for them.

The queue says whose turn it is, but a sequence which cannot join now does not hold up those behind it. One whose
adapter is on its way waits for it outside the batch. One that lacks pages may be overtaken `MAX_OVERTAKEN` times; from
then on nobody behind it is admitted until it is, so the running sequences drain and its pages come free.

Adapters of sequences that the batch has room for are loaded at once; what is loaded for others is `prefetch`'s matter,
and for nobody behind a sequence that lacks pages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum, auto
from itertools import chain

from rekindle.engine.scheduler.adapters import Residency
from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.draft import StepDraft
from rekindle.engine.scheduler.fairness import PROMPT_TOKEN_COST, FlowCounters
from rekindle.engine.scheduler.memory import PageMemory
from rekindle.engine.scheduler.prefetch import LoadsAhead
from rekindle.engine.scheduler.sequence import Sequence, adapters_of
from rekindle.engine.scheduler.waiting import WaitingQueue
from rekindle.protocol.identity import AdapterDigest

MAX_OVERTAKEN = 32
"""Later arrivals admitted past a sequence that lacks pages before the queue waits for it."""

MAX_MISFITS = 16
"""Sequences found to lack pages before a pass over the queue ends: those behind are no likelier to fit."""


class _Outcome(Enum):
    ADMITTED = auto()
    AWAITS_ADAPTER = auto()
    LACKS_PAGES = auto()


class Admission:
    """One pass over the queue. `is_complete` tells, after `run`, that another pass would admit nobody as long as no
    sequence arrives, leaves or gives pages back and no adapter's load ends. `loads_ahead` begins loads for those whose
    turn has not come."""

    def __init__(
        self,
        config: SchedulerConfig,
        memory: PageMemory,
        counters: FlowCounters,
        draft: StepDraft,
        loads_ahead: LoadsAhead,
        running: Collection[Sequence],
        now_s: float,
    ) -> None:
        self.is_complete = False
        self.admitted: list[Sequence] = []
        self.tokens_looked_up = 0
        self.tokens_found = 0
        self._config = config
        self._memory = memory
        self._counters = counters
        self._draft = draft
        self._loads_ahead = loads_ahead
        self._now_s = now_s
        self._running = running
        self._active = adapters_of(running)
        self._overtaken: list[Sequence] = []
        self._keep: set[AdapterDigest] = set()
        self._num_awaiting = 0
        self._num_misfits = 0

    def run(self, queue: WaitingQueue) -> None:
        """Plan first positions of sequences and loads of adapters into the draft; take the admitted off the queue."""
        turns = queue.in_turn(self._active, self._now_s)
        for sequence in turns:
            if self._draft.tokens_left == 0:
                self._load_ahead(sequence, turns)
                return
            if len(self._running) + len(self.admitted) >= self._config.max_sequences:
                self._load_ahead(sequence, turns)
                break
            outcome = self._consider(sequence)
            if outcome is _Outcome.ADMITTED:
                queue.remove(sequence)
                self._join(sequence)
            elif self._ends_pass(sequence, outcome):
                break
        self.is_complete = True

    def _load_ahead(self, first: Sequence, others: Iterable[Sequence] = ()) -> None:
        self._loads_ahead.begin(chain((first,), others), (*self._running, *self.admitted))

    def _join(self, sequence: Sequence) -> None:
        for overtaken in self._overtaken:
            overtaken.num_overtaken += 1
        self.admitted.append(sequence)
        if sequence.request.adapter is not None:
            self._active.add(sequence.request.adapter)
        self._counters.note_turn(sequence.flow, self._now_s)
        if not sequence.was_charged:
            sequence.was_charged = True
            cost = PROMPT_TOKEN_COST * (len(sequence.tokens) - sequence.num_computed)
            self._counters.charge(sequence.flow, cost, sequence.request.weight)
        self._draft.add(sequence, min(sequence.num_plannable, self._draft.tokens_left))

    def _ends_pass(self, sequence: Sequence, outcome: _Outcome) -> bool:
        """Note a sequence that stays behind; True if nobody after it may be admitted."""
        lacks_pages = outcome is _Outcome.LACKS_PAGES
        if lacks_pages or sequence.was_adapter_ready:
            if sequence.num_overtaken >= MAX_OVERTAKEN:
                self._draft.reasons.append(
                    f"nobody behind {sequence.request.request_id} is admitted: it was overtaken "
                    f"{sequence.num_overtaken} times for lack of pages"
                )
                return True
            self._overtaken.append(sequence)
        if lacks_pages:
            self._loads_ahead.end()
            self._num_misfits += 1
        return self._num_misfits >= MAX_MISFITS

    def _consider(self, sequence: Sequence) -> _Outcome:
        digest = sequence.request.adapter
        if digest is not None:
            residency = self._memory.adapters.residency(digest)
            if residency is Residency.LOADING:
                self._num_awaiting += 1
                return _Outcome.AWAITS_ADAPTER
            if residency is Residency.ABSENT:
                return self._load_adapter(sequence, digest)
            # Neither this sequence nor one behind it may evict what it waits to run with.
            self._keep.add(digest)
        return self._take_pages(sequence, digest)

    def _load_adapter(self, sequence: Sequence, digest: AdapterDigest) -> _Outcome:
        """Begin to load if the sequence could also run afterwards, and only for as many as the batch has room for."""
        if len(self._running) + len(self.admitted) + self._num_awaiting >= self._config.max_sequences:
            self._load_ahead(sequence)
            return _Outcome.AWAITS_ADAPTER
        num_pages = self._memory.adapters.num_pages_of(digest)
        if not self._can_have(sequence, num_pages + self._config.pages_for_tokens(len(sequence.tokens))):
            self._load_ahead(sequence)
            return _Outcome.LACKS_PAGES
        pages = self._memory.take(num_pages, self._keep, in_a_row=True)
        self._draft.loads.append(self._memory.adapters.begin_load(digest, pages, self._now_s))
        self._num_awaiting += 1
        return _Outcome.AWAITS_ADAPTER

    def _take_pages(self, sequence: Sequence, digest: AdapterDigest | None) -> _Outcome:
        prefix = self._memory.prefix
        cached = prefix.match(sequence.page_digests())
        num_new = self._config.pages_for_tokens(len(sequence.tokens)) - len(cached)
        if not self._can_have(sequence, num_new + prefix.count_idle(cached)):
            return _Outcome.LACKS_PAGES
        prefix.use(cached)
        fresh = self._memory.take(num_new, self._keep)
        if digest is not None:
            self._memory.adapters.pin(digest)
        sequence.start(cached + fresh, len(cached))
        self.tokens_looked_up += len(sequence.tokens)
        self.tokens_found += sequence.num_computed
        return _Outcome.ADMITTED

    def _can_have(self, sequence: Sequence, num_pages: int) -> bool:
        """One page is left for each running sequence, so that none is preempted by the admission's next token."""
        num_spare = len(self._running) + len(self.admitted)
        num_available = self._memory.num_available(self._keep)
        if num_pages + num_spare <= num_available:
            return True
        self._draft.reasons.append(
            f"{sequence.request.request_id} waits for pages: it takes {num_pages}, {num_spare} are kept for running "
            f"sequences, {num_available} can be had"
        )
        return False
