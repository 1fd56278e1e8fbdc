"""One sequence of a replica: what is known, computed and planned of it.

Three counts move along the positions of a sequence. Positions below `num_computed` hold valid keys and values.
Positions below `num_planned` will, once the steps in flight are committed. `tokens` are known; `num_pending_samples`
more are to be sampled by steps in flight. Whenever a commit gives less, or more, than its plan assumed, the plans made
after it are void: the sequence's `timeline` moves on, and results of an older timeline are dropped.

Everything here follows from the request and the tokens sampled since, so a sequence can be begun anew at any moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from enum import Enum, auto
from itertools import islice
from typing import overload

from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.fairness import Flow
from rekindle.engine.scheduler.plan import PlannedSequence, SequenceResult
from rekindle.engine.scheduler.prefix import page_digest, root_digest
from rekindle.errors import InternalError
from rekindle.protocol.generation import FinishReason, GenerateRequest, Refusal, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest


class SequenceState(Enum):
    """WAITING holds nothing; RUNNING holds pages and its adapter; DRAINING still holds them, is planned no more and
    waits again once the steps in flight are committed; FINISHED has had its last chunk, and gives back what it holds
    once the steps in flight are committed."""

    WAITING = auto()
    RUNNING = auto()
    DRAINING = auto()
    FINISHED = auto()


_NEXT_STATES = {
    SequenceState.WAITING: {SequenceState.RUNNING, SequenceState.FINISHED},
    SequenceState.RUNNING: {SequenceState.DRAINING, SequenceState.FINISHED},
    SequenceState.DRAINING: {SequenceState.WAITING, SequenceState.FINISHED},
    SequenceState.FINISHED: set(),
}


class TokenView(Seq[int]):
    """Items `start .. stop` of a list that only ever grows, without a copy."""

    __slots__ = ("_start", "_stop", "_tokens")

    def __init__(self, tokens: list[int], start: int, stop: int) -> None:
        self._tokens = tokens
        self._start = start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[int]:
        return islice(self._tokens, self._start, self._stop)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(self._start, self._stop)[index]
        if isinstance(places, int):
            return self._tokens[places]
        return [self._tokens[place] for place in places]

    def __repr__(self) -> str:
        return f"TokenView({list(self)})"


class Sequence:
    """An unfinished request. `arrival` numbers the requests of a scheduler in the order they came, `waiting_since_s`
    says when; `flow` is whom it is served for.

    `end_tokens` is the length, prompt included, at which the sequence ends at the latest; `max_positions` are computed
    by then: all but the last, which nothing follows. `page_capacity` positions fit into `pages`. `num_overtaken` counts
    those behind it that were admitted while this one lacked pages; `was_adapter_ready` tells that its adapter was in
    the pool at some time while it waited, `was_charged` that its prompt counts against its flow.
    """

    __slots__ = (
        "_base", "_digests", "_is_first_chunk", "_page_tokens", "_prompt_logprobs", "_sampling", "_uses_prefix_cache",
        "arrival", "cached_tokens", "end_tokens", "flow", "is_caching", "max_positions", "num_cached_pages",
        "num_computed", "num_in_flight", "num_overtaken", "num_pending_samples", "num_planned", "num_prompt",
        "page_capacity", "pages", "request", "state", "timeline", "tokens", "waiting_since_s", "was_adapter_ready",
        "was_charged",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, arrival: int, config: SchedulerConfig, now_s: float = 0.0) -> None:
        self.request = request
        self.flow = Flow.of(request)
        self.arrival = arrival
        self.waiting_since_s = now_s
        self.state = SequenceState.WAITING
        self.tokens = [*request.prompt_token_ids, *request.generated_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.end_tokens = min(self.num_prompt + request.sampling.max_tokens, config.max_context_tokens)
        self.max_positions = max(self.num_prompt, self.end_tokens - 1)
        self.pages: tuple[int, ...] = ()
        self.page_capacity = 0
        self.num_computed = 0
        self.num_planned = 0
        self.num_pending_samples = 0
        self.num_in_flight = 0
        self.timeline = 0
        self.is_caching = False
        self.num_cached_pages = 0
        self.cached_tokens: int | None = None
        self.num_overtaken = 0
        self.was_adapter_ready = False
        self.was_charged = False
        self._sampling = request.sampling
        self._base = config.base
        self._page_tokens = config.page_tokens
        self._is_first_chunk = True
        self._digests: list[bytes] = []
        asks_prompt_logprobs = self._sampling.prompt_logprobs is not None
        self._uses_prefix_cache = not asks_prompt_logprobs
        resumes = bool(request.generated_token_ids)
        self._prompt_logprobs: list[TokenLogprobs | None] | None = (
            [None] if asks_prompt_logprobs and not resumes else None
        )

    @property
    def num_plannable(self) -> int:
        """Positions that a plan may add now."""
        expected = len(self.tokens) + self.num_pending_samples
        return min(expected, self.max_positions) - self.num_planned

    @property
    def num_spare_positions(self) -> int:
        """Positions at the end of its pages that no token known or planned takes."""
        return max(self.page_capacity - max(len(self.tokens), self.num_planned), 0)

    @property
    def ready_reason(self) -> FinishReason | None:
        """Why a sequence is over before it has run, as one resumed with all its tokens is; None if it is not."""
        num_generated = len(self.tokens) - self.num_prompt
        if num_generated and self._is_stop(self.tokens[-1], num_generated - 1):
            return FinishReason.STOP
        return FinishReason.LENGTH if num_generated and len(self.tokens) >= self.end_tokens else None

    def move_to(self, state: SequenceState) -> None:
        """Change state.

        Raises:
            InternalError: no sequence goes from its state to that one.
        """
        if state not in _NEXT_STATES[self.state]:
            raise InternalError(
                f"request {self.request.request_id} is {self.state.name} and cannot become {state.name}"
            )
        self.state = state

    def page_digests(self) -> Iterator[bytes]:
        """Digests of the full pages a lookup may use: never the one with the last known token, which is computed."""
        if self._uses_prefix_cache:
            for page in range((len(self.tokens) - 1) // self._page_tokens):
                yield self._digest(page)

    def start(self, pages: tuple[int, ...], num_cached_pages: int) -> None:
        """Begin to run with a page table whose first `num_cached_pages` are filled."""
        self.move_to(SequenceState.RUNNING)
        self.extend_pages(pages)
        self.num_computed = self.num_planned = num_cached_pages * self._page_tokens
        self.num_cached_pages = num_cached_pages
        self.is_caching = self._uses_prefix_cache
        if self.cached_tokens is None:
            self.cached_tokens = min(self.num_computed, self.num_prompt)

    def extend_pages(self, pages: tuple[int, ...]) -> None:
        """Append to the page table."""
        self.pages += pages
        self.page_capacity = len(self.pages) * self._page_tokens

    def drop_pages(self) -> tuple[int, ...]:
        """Forget what is computed, and return the page table for its pages to be given back."""
        pages = self.pages
        self.pages = ()
        self.page_capacity = self.num_computed = self.num_planned = self.num_pending_samples = 0
        return pages

    def plan(self, num_positions: int) -> PlannedSequence:
        """Plan the next `num_positions` <= `num_plannable` positions, which the page table covers."""
        start = self.num_planned
        end = start + num_positions
        known = len(self.tokens)
        token_ids = tuple(self.tokens[start:end])
        samples = end == known + self.num_pending_samples and self._sampling.max_tokens > 0
        wants_prompt_logprobs = self._lacks_prompt_logprobs and start < self.num_prompt - 1
        self.num_planned = end
        self.num_pending_samples += samples
        self.num_in_flight += 1
        return PlannedSequence(
            request=self.request,
            start=start,
            token_ids=token_ids,
            num_placeholders=num_positions - len(token_ids),
            samples=samples,
            pages=self.pages,
            history=TokenView(self.tokens, self.num_prompt, known),
            wants_prompt_logprobs=wants_prompt_logprobs,
        )

    def check_result(self, planned: PlannedSequence, result: SequenceResult) -> None:
        """Raise InternalError if a result contradicts its plan."""
        if result.error is not None:
            return
        if not 0 <= result.num_accepted <= planned.num_positions:
            raise InternalError(
                f"request {self.request.request_id}: {result.num_accepted} positions accepted of "
                f"{planned.num_positions} planned"
            )
        if self._sampling.logprobs is not None and len(result.logprobs or ()) < len(result.token_ids):
            raise InternalError(
                f"request {self.request.request_id}: {len(result.logprobs or ())} log-probabilities came with "
                f"{len(result.token_ids)} tokens"
            )
        if planned.wants_prompt_logprobs:
            expected = min(result.num_accepted, self.num_prompt - 1 - planned.start)
            if len(result.prompt_logprobs) < expected:
                raise InternalError(
                    f"request {self.request.request_id}: {len(result.prompt_logprobs)} prompt log-probabilities came "
                    f"for {expected} positions from {planned.start} on"
                )

    def accept(self, planned: PlannedSequence, result: SequenceResult) -> tuple[int, FinishReason | None]:
        """Take over a step's result; return how many tokens it added and why they end the sequence, if they do.

        Sampled tokens count only if every position before them was accepted, and only up to the one that ends the
        sequence.
        """
        computed = planned.start + result.num_accepted
        if planned.wants_prompt_logprobs:
            self._collect_prompt_logprobs(planned.start, result)
        num_new = 0
        reason = None
        if planned.samples and computed >= len(self.tokens):
            for token in result.token_ids:
                self.tokens.append(token)
                num_new += 1
                reason = self._reason_to_end(token)
                if reason is not None:
                    break
        if self._sampling.max_tokens == 0:
            reason = FinishReason.LENGTH if computed >= self.num_prompt else None
            self.num_computed = computed
        else:
            # The last token's position is computed again if its sample was not accepted.
            self.num_computed = min(computed, len(self.tokens) - 1)
        if self.num_computed == planned.start + planned.num_positions and num_new == planned.samples:
            self.num_pending_samples -= num_new
        else:
            self.void_later_plans()
        return num_new, reason

    def void_later_plans(self) -> None:
        """Let the next plan go on from what is computed and known; results of plans in flight will be dropped."""
        self.timeline += 1
        self.num_planned = self.num_computed
        self.num_pending_samples = 0

    def next_page_to_cache(self) -> tuple[bytes, int, int | None] | None:
        """The first page that is full and not yet offered to the prefix cache: its digest, itself, the one before."""
        if not self.is_caching or self.num_computed < (self.num_cached_pages + 1) * self._page_tokens:
            return None
        number = self.num_cached_pages
        return self._digest(number), self.pages[number], self.pages[number - 1] if number else None

    def chunk(
        self,
        num_new: int = 0,
        reason: FinishReason | None = None,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        error: str | None = None,
        refusal: Refusal | None = None,
    ) -> TokenChunk:
        """A chunk with the last `num_new` tokens; the first one also says what is known of the prompt."""
        first = len(self.tokens) - num_new
        is_first, self._is_first_chunk = self._is_first_chunk, False
        prompt_logprobs = None
        if is_first and self._prompt_logprobs is not None and not self._lacks_prompt_logprobs:
            prompt_logprobs = tuple(self._prompt_logprobs)
        return TokenChunk(
            request_id=self.request.request_id,
            epoch=self.request.epoch,
            offset=first - self.num_prompt,
            token_ids=tuple(self.tokens[first:]),
            finish_reason=reason,
            logprobs=(logprobs or ())[:num_new] if self._sampling.logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            cached_tokens=self.cached_tokens if is_first else None,
            error=error,
            refusal=refusal,
        )

    @property
    def _lacks_prompt_logprobs(self) -> bool:
        return self._prompt_logprobs is not None and len(self._prompt_logprobs) < self.num_prompt

    def _collect_prompt_logprobs(self, start: int, result: SequenceResult) -> None:
        """Entry i of the result belongs to token start + 1 + i; a sequence begun anew has some of them already."""
        if self._prompt_logprobs is not None:
            num_known = len(self._prompt_logprobs) - (start + 1)
            num_valid = min(result.num_accepted, self.num_prompt - 1 - start)
            self._prompt_logprobs += result.prompt_logprobs[num_known:num_valid]

    def _reason_to_end(self, token: int) -> FinishReason | None:
        if self._is_stop(token, len(self.tokens) - 1 - self.num_prompt):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.end_tokens else None

    def _is_stop(self, token: int, num_before: int) -> bool:
        return token in self._sampling.stop_token_ids and num_before >= self._sampling.min_tokens

    def _digest(self, page: int) -> bytes:
        digests = self._digests
        while len(digests) <= page:
            first = len(digests) * self._page_tokens
            parent = digests[-1] if digests else self._root_digest()
            digests.append(page_digest(parent, self.tokens[first : first + self._page_tokens]))
        return digests[page]

    def _root_digest(self) -> bytes:
        return root_digest(self._base, self.request.adapter, self.request.tenant_salt)


def rank_of(sequence: Sequence) -> tuple[int, int]:
    """Who goes before whom apart from shares: lower priority numbers first, then who came first."""
    return sequence.request.priority, sequence.arrival


def adapters_of(sequences: Iterable[Sequence]) -> set[AdapterDigest]:
    """The adapters that any of the sequences uses."""
    return {adapter for sequence in sequences if (adapter := sequence.request.adapter) is not None}
