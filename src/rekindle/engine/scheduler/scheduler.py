"""Decides what each step of a replica does, and keeps account of what the steps gave.

The loop around it submits requests, asks for a plan, acts on it (`evicted`, then `loads`, then `sequences`), and
commits the result. Plans are executed and committed in the order they were made; further plans may be made before the
first is committed. A plan without sequences needs no commit, but its evictions and loads must still be carried out.

Pages and adapters named in an uncommitted plan are not given to anyone else, even if their sequence ends or is
preempted meanwhile. No method reads a clock: `now_s` never falls, and decides deadlines, ages and advice
on when to come back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from rekindle.engine.scheduler.adapters import Residency
from rekindle.engine.scheduler.admission import Admission
from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.deadlines import FirstTokenEstimate, LoadForecast, deadline_s, late_sequences
from rekindle.engine.scheduler.draft import StepDraft
from rekindle.engine.scheduler.fairness import OUTPUT_TOKEN_COST, FlowCounters
from rekindle.engine.scheduler.memory import PageMemory
from rekindle.engine.scheduler.merging import MergePolicy, mix_of
from rekindle.engine.scheduler.plan import PlannedSequence, SequenceResult, StepPlan, StepResult
from rekindle.engine.scheduler.prefetch import LoadsAhead
from rekindle.engine.scheduler.sequence import Sequence, SequenceState, adapters_of, rank_of
from rekindle.engine.scheduler.statistics import Totals, engine_stats
from rekindle.engine.scheduler.step_times import StepTimes
from rekindle.engine.scheduler.validation import check_fits, check_prompt
from rekindle.engine.scheduler.waiting import DepartureRate, WaitingQueue
from rekindle.errors import Conflict, InternalError, Overloaded
from rekindle.policy.load_estimates import LoadEstimates
from rekindle.policy.load_queue import LoadTiming
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import FinishReason, GenerateRequest, Refusal, TokenChunk
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineStats

__all__ = ["Scheduler", "SchedulerConfig"]


class Scheduler:
    """Continuous batching over one pool of pages; see the module for the protocol of its use."""

    def __init__(
        self, config: SchedulerConfig, merging: MergePolicy | None = None, load_estimates: LoadEstimates | None = None
    ) -> None:
        self._config = config
        self._merging = merging
        self._times = StepTimes()
        self._memory = PageMemory(config, self._times, load_estimates or LoadEstimates())
        self._adapters = self._memory.adapters
        self._unfinished: dict[RequestId, Sequence] = {}
        self._counters = FlowCounters()
        self._has_deadlines = False
        self._queue = WaitingQueue(self._counters)
        self._running: list[Sequence] = []
        self._leaving: set[Sequence] = set()
        self._in_flight: deque[tuple[StepPlan, list[tuple[Sequence, int]]]] = deque()
        self._departures = DepartureRate()
        self._num_submitted = 0
        self._step = 0
        self._now_s = 0.0
        self._may_admit = False
        self._may_plan = False
        self._totals = Totals()

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._unfinished)

    @property
    def has_runnable(self) -> bool:
        """Whether `schedule` may find something to do: False from an empty plan on until something changes."""
        return self._may_plan and bool(self._unfinished)

    @property
    def next_deadline_s(self) -> float | None:
        """When `refuse_late` is to be called even if nothing is runnable: the first moment at which a waiting
        sequence's first token is overdue."""
        if not self._has_deadlines:
            return None
        return min((due_s for it in self._queue if (due_s := deadline_s(it)) is not None), default=None)

    def submit(self, request: GenerateRequest, now_s: float) -> tuple[TokenChunk, ...]:
        """Queue a sequence. Returns its only chunk if it is resumed and already complete, and the last chunk of the
        sequence that it displaces in a full queue, if it does.

        A resumed request (epoch > 0) was accepted before and is not turned away by a full queue.

        Raises:
            InvalidRequest: its prompt is empty or too long for the context, or it can never fit into the pool.
            NotFound: its adapter version is unknown or removed.
            Conflict: a request of that id is unfinished here.
            Overloaded: the queue is full, and its flow has its share of the places.
        """
        if request.request_id in self._unfinished:
            raise Conflict(f"request {request.request_id} is unfinished here; abort it before submitting it again")
        check_prompt(request, self._config)
        sequence = Sequence(request, self._num_submitted, self._config, now_s)
        reason = sequence.ready_reason
        if reason is not None:
            return (sequence.chunk(reason=reason),)
        num_adapter_pages = 0
        if request.adapter is not None:
            self._adapters.require(request.adapter)
            num_adapter_pages = self._adapters.num_pages_of(request.adapter)
        check_fits(sequence, num_adapter_pages, self._config)
        displaced: tuple[TokenChunk, ...] = ()
        if request.epoch == 0 and len(self._queue) >= self._config.max_queued:
            displaced = self._make_place(sequence, now_s)
        if request.adapter is not None:
            self._adapters.reference(request.adapter, now_s)
            sequence.was_adapter_ready = self._adapters.residency(request.adapter) is Residency.READY
        self._now_s = now_s
        self._num_submitted += 1
        self._totals.prompt_tokens += sequence.num_prompt
        self._unfinished[request.request_id] = sequence
        self._counters.begin(sequence.flow)
        self._has_deadlines |= request.ttft_slo_s is not None
        self._queue.add(sequence)
        self._note_change()
        return displaced

    def abort(self, request_id: RequestId) -> tuple[TokenChunk, ...]:
        """End a sequence; its pages are free at once, or with the commit of its last step in flight.

        Returns its last chunk, or nothing if the id is unknown.
        """
        sequence = self._unfinished.get(request_id)
        if sequence is None:
            return ()
        return (self._finish(sequence, sequence.chunk(reason=FinishReason.ABORT)),)

    def add_adapter(self, manifest: AdapterManifest, path: str = "") -> None:
        """Make a version known, whose file is at `path`.

        Raises:
            AdapterRejected: it belongs to another base model, or is stored in a layout of an earlier version.
        """
        self._adapters.add(manifest, path)

    def remove_adapter(self, digest: AdapterDigest) -> None:
        """Refuse a version to new requests, and forget it once no unfinished sequence uses it."""
        self._adapters.remove(digest)
        self._note_change()

    def adapter_loaded(self, digest: AdapterDigest, now_s: float, timing: LoadTiming | None = None) -> None:
        """An `AdapterLoad` has been carried out by `now_s`, which teaches how long loads take: as it was timed, or else
        by when ends of loads are reported.

        Raises:
            InternalError: no such load is under way.
        """
        self._adapters.end_load(digest, now_s, timing)
        for sequence in self._queue:
            if sequence.request.adapter == digest:
                sequence.was_adapter_ready = True
        self._note_change()

    def adapter_failed(
        self, digest: AdapterDigest, message: str, now_s: float, timing: LoadTiming | None = None
    ) -> tuple[TokenChunk, ...]:
        """An `AdapterLoad` has failed: the sequences that wait for it end with `message`.

        Raises:
            InternalError: no such load is under way.
        """
        self._adapters.fail_load(digest, now_s, timing)
        self._note_change()
        failed = [sequence for sequence in self._queue if sequence.request.adapter == digest]
        return tuple(
            self._finish(sequence, sequence.chunk(reason=FinishReason.ERROR, error=message)) for sequence in failed
        )

    def note_duration(self, plan: StepPlan, duration_s: float) -> None:
        """Running a plan's sequences took that long."""
        num_decodes = sum(planned.num_positions == 1 for planned in plan.sequences)
        self._times.note(plan.num_tokens - num_decodes, num_decodes, duration_s)

    def refuse_late(self, now_s: float) -> tuple[TokenChunk, ...]:
        """End the waiting sequences that can no longer have their first token in time; see `deadlines`."""
        if not self._has_deadlines:
            return ()
        self._has_deadlines = any(sequence.request.ttft_slo_s is not None for sequence in self._queue)
        active = adapters_of(self._running)
        estimate = FirstTokenEstimate(self._config, self._times, self._running, self._departures.mean_interval_s)
        loads = LoadForecast(self._adapters, now_s)
        late = late_sequences(self._queue.in_turn(active, now_s), estimate, loads, self._num_cached, now_s)
        self._totals.refused_late += len(late)
        return tuple(self._finish(it.sequence, it.chunk()) for it in late)

    def schedule(self, now_s: float) -> StepPlan:
        """Plan a step: one token of every running sequence, then prompt chunks, then newly admitted sequences."""
        self._now_s = now_s
        self._step += 1
        draft = StepDraft(self._config.max_step_tokens)
        self._plan_running(draft)
        if self._may_admit and not draft.is_short_of_pages:
            self._admit(draft, now_s)
        if self._merging is not None and draft.planned:
            draft.merge = self._merging.choose(mix_of(draft.planned), now_s)
        plan = draft.build(self._step, self._adapters.take_evicted())
        if plan.sequences:
            self._in_flight.append((plan, draft.timelines))
            self._totals.steps += 1
        self._may_plan = bool(plan.sequences or plan.preempted)
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> tuple[TokenChunk, ...]:
        """Take over the result of the oldest plan not yet committed; return what its sequences gained.

        Raises:
            InternalError: it is not the oldest such plan, or the result does not match it.
        """
        if not plan.sequences:
            return ()
        timelines = self._take_in_flight(plan, result)
        chunks = []
        for (sequence, timeline), planned, outcome in zip(timelines, plan.sequences, result.sequences, strict=True):
            sequence.num_in_flight -= 1
            if sequence.timeline == timeline:
                chunk = self._apply(sequence, planned, outcome)
                if chunk is not None:
                    chunks.append(chunk)
            if sequence.num_in_flight == 0 and sequence in self._leaving:
                self._settle(sequence)
        self._may_plan = True
        return tuple(chunks)

    def stats(self) -> EngineStats:
        """Load and memory as of now. Prefix queries and hits count tokens looked up and found."""
        num_waiting = len(self._unfinished) - len(self._running)
        stats = engine_stats(self._config, self._memory, self._totals, num_waiting, self._running, self._leaving)
        if self._merging is None:
            return stats
        return replace(stats, merged_adapter=self._merging.merged, steps_merged_total=self._merging.num_merged_steps)

    def check_integrity(self) -> None:
        """Raise InternalError unless every page is held by exactly those who should hold it; looks at every page."""
        holders = [*self._running, *self._leaving]
        self._memory.check_integrity([sequence.pages for sequence in holders])
        waiting = {sequence for sequence in self._unfinished.values() if sequence.state is SequenceState.WAITING}
        if waiting != set(self._queue) or len(waiting) != len(self._queue):
            raise InternalError("the queue does not hold exactly the waiting sequences")
        for sequence in waiting:
            if sequence.pages or sequence.num_in_flight:
                raise InternalError(f"request {sequence.request.request_id} waits, but holds pages or is in flight")
        if any(sequence.state is not SequenceState.RUNNING for sequence in self._running):
            raise InternalError("a sequence is in the batch that is not running")

    def _make_place(self, newcomer: Sequence, now_s: float) -> tuple[TokenChunk, ...]:
        """End a sequence of the flow that holds most places of the full queue, or refuse the newcomer."""
        self._totals.refused_full += 1
        retry_after_s = self._departures.expected_wait_s(now_s)
        displaced = self._queue.to_displace(newcomer)
        if displaced is None:
            raise Overloaded(
                f"{len(self._queue)} requests wait already and max_queued is {self._config.max_queued}; try again "
                "later, or raise max_queued",
                retry_after_s=retry_after_s,
            )
        message = (
            f"the queue of {self._config.max_queued} requests is full, and most of them are of the same tenant and "
            "adapter as this one, the last of them; try again later, or raise max_queued"
        )
        refusal = Refusal(Overloaded.__name__, retry_after_s=retry_after_s)
        return (self._finish(displaced, displaced.chunk(reason=FinishReason.ERROR, error=message, refusal=refusal)),)

    def _num_cached(self, sequence: Sequence) -> int:
        return len(self._memory.prefix.match(sequence.page_digests())) * self._config.page_tokens

    def _note_change(self) -> None:
        self._may_admit = self._may_plan = True

    def _plan_running(self, draft: StepDraft) -> None:
        """Decodes first, oldest first; then chunks of prompts. Preemption takes sequences from the batch's end."""
        running = self._running
        behind = []
        index = 0
        while index < len(running):
            sequence = running[index]
            index += 1
            num_positions = sequence.num_plannable
            if num_positions > 1:
                behind.append(sequence)
            elif num_positions == 1 and self._cover(sequence, 1, draft):
                draft.add(sequence, 1)
        for sequence in behind:
            if sequence.state is not SequenceState.RUNNING:
                continue
            num_positions = min(sequence.num_plannable, draft.tokens_left)
            if num_positions and self._cover(sequence, num_positions, draft):
                draft.add(sequence, num_positions)

    def _cover(self, sequence: Sequence, num_positions: int, draft: StepDraft) -> bool:
        """See that the page table covers the next positions; False if the sequence cannot go on in this step.

        Without pages to be had, the latest arrivals in the batch give theirs back. Pages of sequences whose last steps
        are still in flight come free soon and are waited for instead.
        """
        end = sequence.num_planned + num_positions
        if end <= sequence.page_capacity:
            return True
        num_pages = self._config.pages_for_tokens(end) - len(sequence.pages)
        while (pages := self._memory.allocate(num_pages)) is None:
            draft.is_short_of_pages = True
            if self._leaving or len(self._running) == 1:
                draft.reasons.append(f"{sequence.request.request_id} stands still: it waits for {num_pages} pages")
                return False
            victim = self._running[-1]
            self._preempt(victim, sequence, draft)
            if victim is sequence:
                return False
        sequence.extend_pages(pages)
        return True

    def _preempt(self, victim: Sequence, beneficiary: Sequence, draft: StepDraft) -> None:
        draft.preempted.append(victim.request.request_id)
        draft.reasons.append(
            f"{victim.request.request_id} gives back {len(victim.pages)} pages and is computed again later: "
            f"{beneficiary.request.request_id} needs pages and none can be evicted"
        )
        self._totals.preemptions += 1
        self._running.remove(victim)
        victim.move_to(SequenceState.DRAINING)
        self._leave(victim)

    def _admit(self, draft: StepDraft, now_s: float) -> None:
        ahead = LoadsAhead(self._config, self._memory, self._times, draft, now_s)
        admission = Admission(self._config, self._memory, self._counters, draft, ahead, self._running, now_s)
        admission.run(self._queue)
        self._may_admit = not admission.is_complete
        self._departures.note(len(admission.admitted), len(self._queue), now_s)
        if admission.admitted:
            self._running += admission.admitted
            self._running.sort(key=rank_of)
            self._totals.tokens_looked_up += admission.tokens_looked_up
            self._totals.tokens_found += admission.tokens_found

    def _take_in_flight(self, plan: StepPlan, result: StepResult) -> list[tuple[Sequence, int]]:
        """Check everything before anything changes."""
        if not self._in_flight or self._in_flight[0][0].step != plan.step:
            raise InternalError(f"step {plan.step} is not the oldest plan in flight and cannot be committed")
        if result.step != plan.step or len(result.sequences) != len(plan.sequences):
            raise InternalError(
                f"step {plan.step} has {len(plan.sequences)} sequences, but its result is of step {result.step} "
                f"with {len(result.sequences)}"
            )
        timelines = self._in_flight[0][1]
        for (sequence, timeline), planned, outcome in zip(timelines, plan.sequences, result.sequences, strict=True):
            if sequence.timeline == timeline:
                sequence.check_result(planned, outcome)
        self._in_flight.popleft()
        return timelines

    def _apply(self, sequence: Sequence, planned: PlannedSequence, outcome: SequenceResult) -> TokenChunk | None:
        if outcome.error is not None:
            return self._finish(sequence, sequence.chunk(reason=FinishReason.ERROR, error=outcome.error))
        num_new, reason = sequence.accept(planned, outcome)
        self._totals.generated_tokens += num_new
        self._counters.charge(sequence.flow, OUTPUT_TOKEN_COST * num_new, sequence.request.weight)
        if sequence.is_caching:
            self._cache_full_pages(sequence)
        if reason is not None:
            return self._finish(sequence, sequence.chunk(num_new, reason, outcome.logprobs))
        return sequence.chunk(num_new, None, outcome.logprobs) if num_new else None

    def _cache_full_pages(self, sequence: Sequence) -> None:
        while (full := sequence.next_page_to_cache()) is not None:
            sequence.is_caching = self._memory.prefix.insert(*full)
            sequence.num_cached_pages += 1

    def _finish(self, sequence: Sequence, last: TokenChunk) -> TokenChunk:
        """End a sequence in any state; what it holds is given back when no step in flight uses it."""
        request = sequence.request
        if sequence.state is SequenceState.WAITING:
            self._queue.remove(sequence)
            if not self._queue:
                self._departures.pause()
        elif sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
        holds_pages = sequence.state is not SequenceState.WAITING
        sequence.move_to(SequenceState.FINISHED)
        sequence.void_later_plans()
        del self._unfinished[request.request_id]
        self._counters.end(sequence.flow)
        if holds_pages:
            self._leave(sequence)
        if request.adapter is not None:
            self._adapters.unreference(request.adapter)
        self._note_change()
        return last

    def _leave(self, sequence: Sequence) -> None:
        self._leaving.add(sequence)
        if sequence.num_in_flight == 0:
            self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Take back what a sequence holds that has left the batch and is in no step in flight."""
        self._leaving.discard(sequence)
        self._memory.prefix.release(sequence.drop_pages(), self._now_s)
        if sequence.request.adapter is not None:
            self._adapters.unpin(sequence.request.adapter)
        if sequence.state is SequenceState.DRAINING:
            sequence.move_to(SequenceState.WAITING)
            self._queue.add(sequence)
            self._has_deadlines |= sequence.request.ttft_slo_s is not None
        self._note_change()
