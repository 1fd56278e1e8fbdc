"""A model of a device for the scheduler's tests: pages whose slots can be compared with what they should hold.

A slot holds a number that depends on the adapter, the tenant and every token up to its position, and the next token
depends on the slot before it. A page given to the wrong sequence, used again too late or evicted too early therefore
changes a slot that is compared, and the text that comes out.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import astuple, dataclass, field
from hashlib import blake2b

from rekindle.engine.scheduler.plan import AdapterLoad, PlannedSequence, SequenceResult, StepPlan, StepResult
from rekindle.engine.scheduler.scheduler import Scheduler, SchedulerConfig
from rekindle.protocol.adapters import ADAPTER_LAYOUT, AdapterManifest
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import AdapterDigest, ModelDigest, RequestId
from rekindle.protocol.sampling import SamplingParams

BASE = ModelDigest("base")
VOCABULARY = 7
PAGE_TOKENS = 4
PAGE_BYTES = 64
TOKEN_BYTES = 15
"""So that a page is a little longer than its tokens, as pages often are."""
ELEMENT_BYTES = 2
STEP_S = 0.01
_RUBBISH = -1


def make_config(
    num_pages: int = 64,
    max_step_tokens: int = 32,
    max_sequences: int = 8,
    max_queued: int = 1000,
    max_context_tokens: int = 1000,
) -> SchedulerConfig:
    return SchedulerConfig(
        base=BASE,
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        page_bytes=PAGE_BYTES,
        token_bytes=TOKEN_BYTES,
        element_bytes=ELEMENT_BYTES,
        max_step_tokens=max_step_tokens,
        max_sequences=max_sequences,
        max_queued=max_queued,
        max_context_tokens=max_context_tokens,
    )


def make_manifest(name: str, num_pages: int = 1) -> AdapterManifest:
    return AdapterManifest(
        digest=AdapterDigest(name),
        base=BASE,
        dtype="BF16",
        num_elements=num_pages * PAGE_BYTES // ELEMENT_BYTES,
        ranks=(8,),
        targets=("q_proj",),
        bindings=(),
        layout=ADAPTER_LAYOUT,
    )


def make_request(
    name: str,
    prompt: tuple[int, ...] | int = 5,
    max_tokens: int = 8,
    *,
    adapter: str | None = None,
    tenant_salt: str = "",
    tenant: str = "",
    weight: float = 1.0,
    priority: int = 0,
    ttft_slo_s: float | None = None,
    min_tokens: int = 0,
    stop: tuple[int, ...] = (),
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    generated: tuple[int, ...] = (),
    epoch: int = 0,
) -> GenerateRequest:
    """A request; a number as prompt asks for that many different tokens of its own."""
    if isinstance(prompt, int):
        first = int.from_bytes(blake2b(name.encode(), digest_size=3).digest())
        prompt = tuple(range(first, first + prompt))
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=prompt,
        sampling=SamplingParams(
            max_tokens=max_tokens,
            seed=0,
            min_tokens=min_tokens,
            stop_token_ids=stop,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        ),
        epoch=epoch,
        adapter=None if adapter is None else AdapterDigest(adapter),
        generated_token_ids=generated,
        tenant_salt=tenant_salt,
        tenant=tenant,
        weight=weight,
        priority=priority,
        ttft_slo_s=ttft_slo_s,
    )


def _mix(value: int, token: int) -> int:
    return (value * 6364136223846793005 + token + 1442695040888963407) % (1 << 64)


class Truth:
    """What a request's slots, tokens and chunks must be, computed without any scheduler."""

    def __init__(self, request: GenerateRequest, max_context_tokens: int) -> None:
        sampling = request.sampling
        self.request = request
        root = repr((request.adapter, request.tenant_salt)).encode()
        self.root = int.from_bytes(blake2b(root, digest_size=8).digest())
        self.tokens = list(request.prompt_token_ids)
        self.slots: list[int] = []
        self.reason = FinishReason.LENGTH
        self._extend_slots()
        num_prompt = len(self.tokens)
        end = min(num_prompt + sampling.max_tokens, max_context_tokens)
        while len(self.tokens) < end:
            token = self.sample(self.slots[-1])
            num_before = len(self.tokens) - num_prompt
            self.tokens.append(token)
            self._extend_slots()
            if token in sampling.stop_token_ids and num_before >= sampling.min_tokens:
                self.reason = FinishReason.STOP
                break
        self.output = tuple(self.tokens[num_prompt:])

    @staticmethod
    def sample(slot: int) -> int:
        return (slot >> 20) % VOCABULARY

    @staticmethod
    def logprob(token: int, slot: int) -> TokenLogprobs:
        """The log-probability of `token` after `slot`."""
        return TokenLogprobs(token, -float((slot >> 24) % 97))

    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        prompt = self.request.prompt_token_ids
        return (None, *(self.logprob(prompt[i + 1], self.slots[i]) for i in range(len(prompt) - 1)))

    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        first = len(self.request.prompt_token_ids)
        return tuple(self.logprob(self.tokens[i], self.slots[i - 1]) for i in range(first, len(self.tokens)))

    def _extend_slots(self) -> None:
        while len(self.slots) < len(self.tokens):
            position = len(self.slots)
            self.slots.append(_mix(self.slots[-1] if position else self.root, self.tokens[position]))


@dataclass
class Noise:
    """How often, of a hundred results, a runner accepts less than planned, gives more tokens, or fails."""

    random: random.Random = field(default_factory=lambda: random.Random(0))
    partial_percent: int = 0
    extra_percent: int = 0
    error_percent: int = 0

    def happens(self, percent: int) -> bool:
        return self.random.randrange(100) < percent


class PagedDevice:
    """Pages with slots; carries out plans and compares what every planned sequence finds below its start."""

    def __init__(self, num_pages: int, noise: Noise) -> None:
        self.pages: list[list[object]] = [[_RUBBISH] * PAGE_TOKENS for _ in range(num_pages)]
        self.loads: dict[AdapterDigest, AdapterLoad] = {}
        self.adapters: dict[AdapterDigest, tuple[int, ...]] = {}
        self._noise = noise

    def take_up(self, plan: StepPlan) -> None:
        """Evict and begin loads, as early as a loop may: while older plans still run."""
        for digest in plan.evicted:
            del self.adapters[digest]
        for load in plan.loads:
            assert load.manifest.digest not in self.loads, "one load at a time"
            assert load.manifest.digest not in self.adapters, "already loaded"
            self.loads[load.manifest.digest] = load
            self._fill(load.pages, "loading")

    def finish_load(self, digest: AdapterDigest, succeeds: bool) -> None:
        load = self.loads.pop(digest)
        if succeeds:
            self._fill(load.pages, digest)
            self.adapters[digest] = load.pages

    def compute(self, planned: PlannedSequence, truth: Truth) -> SequenceResult:
        """Run one sequence whose plan still holds."""
        self._check(planned, truth)
        start, end = planned.start, planned.start + planned.num_positions
        value = self._read(planned, start - 1) if start else truth.root
        for position in range(start, end):
            value = _mix(value, truth.tokens[position])
            self._write(planned, position, value)
        if self._noise.happens(self._noise.error_percent):
            return SequenceResult(error="the device failed")
        num_accepted = planned.num_positions
        token_ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] = ()
        if self._noise.happens(self._noise.partial_percent):
            num_accepted = self._noise.random.randint(0, num_accepted)
            for position in range(start + num_accepted, end):
                self._write(planned, position, _RUBBISH)
            if planned.samples and num_accepted < planned.num_positions and self._noise.happens(50):
                token_ids, logprobs = (VOCABULARY + 1,), (TokenLogprobs(VOCABULARY + 1, 0.0),)
        elif planned.samples:
            wanted = self._noise.random.randint(2, 4) if self._noise.happens(self._noise.extra_percent) else 1
            assert end < len(truth.tokens), "the sequence was over before"
            assert Truth.sample(value) == truth.tokens[end]
            token_ids, logprobs = self._continue(truth, end, wanted)
        prompt = truth.request.prompt_token_ids
        last = min(end, len(prompt) - 1)
        prompt_logprobs = tuple(
            Truth.logprob(prompt[i + 1], truth.slots[i] if i < start + num_accepted else 0) for i in range(start, last)
        )
        return SequenceResult(
            token_ids=token_ids,
            num_accepted=num_accepted,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs if planned.wants_prompt_logprobs else (),
        )

    def compute_void(self, planned: PlannedSequence) -> SequenceResult:
        """Run one sequence whose plan was overtaken by events: it writes rubbish and reports rubbish."""
        for position in range(planned.start, planned.start + planned.num_positions):
            self._write(planned, position, _RUBBISH)
        if self._noise.happens(30):
            return SequenceResult(error="a sequence that nobody waits for failed")
        return SequenceResult(token_ids=(VOCABULARY + 1,), num_accepted=planned.num_positions)

    @staticmethod
    def _continue(truth: Truth, first: int, count: int) -> tuple[tuple[int, ...], tuple[TokenLogprobs, ...]]:
        """`count` tokens from position `first` on, with rubbish where the sequence is over."""
        known = range(first, min(first + count, len(truth.tokens)))
        num_beyond = count - len(known)
        token_ids = (*(truth.tokens[i] for i in known), *((VOCABULARY + 1,) * num_beyond))
        logprobs = (*(Truth.logprob(truth.tokens[i], truth.slots[i - 1]) for i in known),)
        return token_ids, logprobs + (TokenLogprobs(VOCABULARY + 1, 0.0),) * num_beyond

    def _check(self, planned: PlannedSequence, truth: Truth) -> None:
        request = planned.request
        known = planned.start + len(planned.token_ids)
        assert list(planned.token_ids) == truth.tokens[planned.start : known]
        num_history = len(planned.history)
        assert list(planned.history) == list(truth.output[:num_history])
        found = [self._read(planned, position) for position in range(planned.start)]
        assert found == truth.slots[: planned.start], f"{request.request_id} finds the wrong keys and values"
        if request.adapter is not None:
            pages = self.adapters[request.adapter]
            assert all(slot == request.adapter for page in pages for slot in self.pages[page])

    def _read(self, planned: PlannedSequence, position: int) -> object:
        return self.pages[planned.pages[position // PAGE_TOKENS]][position % PAGE_TOKENS]

    def _write(self, planned: PlannedSequence, position: int, value: object) -> None:
        self.pages[planned.pages[position // PAGE_TOKENS]][position % PAGE_TOKENS] = value

    def _fill(self, pages: tuple[int, ...], value: object) -> None:
        for page in pages:
            self.pages[page] = [value] * PAGE_TOKENS


class Replica:
    """A scheduler and a device, run with up to `depth` plans in flight; checks every plan and collects the chunks."""

    def __init__(self, config: SchedulerConfig, depth: int = 1, noise: Noise | None = None) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.noise = noise or Noise()
        self.device = PagedDevice(config.num_pages, self.noise)
        self.depth = depth
        self.truths: dict[RequestId, Truth] = {}
        self.chunks: dict[RequestId, list[TokenChunk]] = {}
        self.plans: list[StepPlan] = []
        self.now_s = 0.0
        self._in_flight: deque[StepPlan] = deque()
        self._void_up_to: dict[RequestId, int] = {}

    def submit(self, request: GenerateRequest) -> None:
        self.truths[request.request_id] = Truth(request, self.config.max_context_tokens)
        self.collect(self.scheduler.submit(request, self.now_s))

    def abort(self, request_id: RequestId) -> None:
        self.collect(self.scheduler.abort(request_id))

    def end_load(self, digest: AdapterDigest, error: str | None = None) -> None:
        self.device.finish_load(digest, succeeds=error is None)
        if error is None:
            self.scheduler.adapter_loaded(digest, self.now_s)
        else:
            self.collect(self.scheduler.adapter_failed(digest, error, self.now_s))

    def end_all_loads(self) -> None:
        for digest in tuple(self.device.loads):
            self.end_load(digest)

    def schedule(self) -> StepPlan:
        self.now_s += STEP_S
        plan = self.scheduler.schedule(self.now_s)
        self.plans.append(plan)
        self.device.take_up(plan)
        if plan.sequences:
            self._in_flight.append(plan)
        self._check_budgets(plan)
        return plan

    def execute_and_commit(self) -> None:
        """Run the oldest plan in flight."""
        plan = self._in_flight.popleft()
        results = []
        for planned in plan.sequences:
            request_id = planned.request.request_id
            if self._void_up_to.get(request_id, 0) >= plan.step:
                results.append(self.device.compute_void(planned))
                continue
            result = self.device.compute(planned, self.truths[request_id])
            if result.num_accepted < planned.num_positions or len(result.token_ids) != planned.samples:
                self._void_up_to[request_id] = self.plans[-1].step
            results.append(result)
        self.collect(self.scheduler.commit(plan, StepResult(plan.step, tuple(results))))

    def step(self) -> StepPlan:
        """Plan once and, with `depth` plans in flight or nothing left to plan, run the oldest."""
        plan = self.schedule()
        if self._in_flight and (len(self._in_flight) >= self.depth or not plan.sequences):
            self.execute_and_commit()
        self.scheduler.check_integrity()
        self._check_bytes()
        return plan

    def run(self, max_steps: int = 2000) -> None:
        """Step, with loads that end at once, until no sequence is unfinished."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
            self.end_all_loads()
        assert not self.scheduler.has_work, f"unfinished after {max_steps} steps"
        self.drain()

    def drain(self) -> None:
        """Commit what is in flight."""
        while self._in_flight:
            self.execute_and_commit()
        self.scheduler.check_integrity()

    def collect(self, chunks: tuple[TokenChunk, ...]) -> None:
        for chunk in chunks:
            known = self.chunks.setdefault(chunk.request_id, [])
            request = self.truths[chunk.request_id].request
            expected = len(request.generated_token_ids) + sum(len(earlier.token_ids) for earlier in known)
            assert chunk.offset == expected, "a gap or a repetition"
            assert not (known and known[-1].finish_reason), "a chunk after the last one"
            assert chunk.epoch == request.epoch
            known.append(chunk)
            if chunk.finish_reason is not None:
                self._void_up_to[chunk.request_id] = self.plans[-1].step if self.plans else 0

    def output(self, name: str) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks.get(RequestId(name), ()) for token in chunk.token_ids)

    def finish_reason(self, name: str) -> FinishReason | None:
        return self.chunks[RequestId(name)][-1].finish_reason

    def check_stream(self, request_id: RequestId) -> None:
        """The stream of a request that was not ended from outside is exactly its truth."""
        truth = self.truths[request_id]
        request = truth.request
        chunks = self.chunks[request_id]
        assert request.generated_token_ids + self.output(request_id) == truth.output
        assert chunks[-1].finish_reason is truth.reason
        assert all(chunk.finish_reason is None for chunk in chunks[:-1])
        for chunk in chunks:
            assert (chunk.logprobs is None) == (request.sampling.logprobs is None)
            if chunk.logprobs is not None:
                assert chunk.logprobs == truth.logprobs()[chunk.offset : chunk.offset + len(chunk.token_ids)]
        assert all(chunk.prompt_logprobs is None and chunk.cached_tokens is None for chunk in chunks[1:])
        if request.sampling.prompt_logprobs is not None and not request.generated_token_ids:
            assert chunks[0].prompt_logprobs == truth.prompt_logprobs()
        else:
            assert chunks[0].prompt_logprobs is None

    def _check_bytes(self) -> None:
        """Every byte of the pool is reported once, and those of adapters are where the device has them."""
        report = self.scheduler.stats().pool_bytes
        assert min(astuple(report)) >= 0
        assert sum(astuple(report)) == self.config.num_pages * PAGE_BYTES
        num_loading = sum(len(load.pages) for load in self.device.loads.values())
        num_resident = sum(len(pages) for pages in self.device.adapters.values())
        assert -(-report.adapters_loading // PAGE_BYTES) <= num_loading
        adapter_bytes = report.adapters_in_use + report.adapters_loading + report.adapters_idle
        assert adapter_bytes + report.waste_adapter_tails <= (num_loading + num_resident) * PAGE_BYTES

    def _check_budgets(self, plan: StepPlan) -> None:
        assert plan.num_tokens <= self.config.max_step_tokens
        assert len(plan.sequences) <= self.config.max_sequences
        assert len({planned.request.request_id for planned in plan.sequences}) == len(plan.sequences)
        for planned in plan.sequences:
            assert planned.num_positions > 0
            assert len(planned.pages) * PAGE_TOKENS >= planned.start + planned.num_positions
            assert len(set(planned.pages)) == len(planned.pages)
        self._check_writers()

    def _check_writers(self) -> None:
        """A page that a planned step writes is in no other sequence's table and in no adapter."""
        readers: dict[int, set[RequestId]] = {}
        written: dict[int, RequestId] = {}
        for plan in self._in_flight:
            for planned in plan.sequences:
                request_id = planned.request.request_id
                for page in planned.pages:
                    readers.setdefault(page, set()).add(request_id)
                first = planned.start // PAGE_TOKENS
                last = (planned.start + planned.num_positions - 1) // PAGE_TOKENS
                for page in planned.pages[first : last + 1]:
                    written[page] = request_id
        adapter_pages = {page for pages in self.device.adapters.values() for page in pages}
        adapter_pages |= {page for load in self.device.loads.values() for page in load.pages}
        for page, writer in written.items():
            assert readers[page] == {writer}, f"page {page} is written by {writer} and read by {readers[page]}"
        assert not adapter_pages & readers.keys()
