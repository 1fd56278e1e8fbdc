"""Random arrivals, aborts, adapter churn, failures and partial results, against requests computed one by one."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rekindle.errors import InvalidRequest, NotFound
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.identity import AdapterDigest
from support.scheduling import VOCABULARY, Noise, Replica, Truth, make_config, make_manifest, make_request

ADAPTER_PAGES = {"adapter-0": 1, "adapter-1": 2, "adapter-2": 5}
CONTEXT_TOKENS = 40


@dataclass(frozen=True)
class Arrival:
    """One request of a scenario, the steps after the previous one at which it comes, and when it is aborted if ever."""

    gap: int
    prompt: tuple[int, ...]
    max_tokens: int
    min_tokens: int
    num_resumed: int
    adapter: str | None
    tenant_salt: str
    has_stop: bool
    logprobs: int | None
    prompt_logprobs: int | None
    abort_after: int | None

    def request(self, name):
        fields = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "adapter": self.adapter,
            "tenant_salt": self.tenant_salt,
            "min_tokens": min(self.min_tokens, self.max_tokens),
            "stop": (0,) if self.has_stop else (),
            "logprobs": self.logprobs,
            "prompt_logprobs": self.prompt_logprobs,
        }
        generated = Truth(make_request(name, **fields), CONTEXT_TOKENS).output[: self.num_resumed]
        return make_request(name, **fields, generated=generated, epoch=1 if generated else 0)


def optional(strategy):
    return st.one_of(st.none(), st.none(), st.none(), strategy)


SHARED_STEM = (1, 2, 1, 1, 2, 2, 1, 2, 1, 1, 1, 2)
ARRIVALS = st.builds(
    Arrival,
    gap=st.integers(0, 3),
    prompt=st.builds(
        lambda stem, tail: SHARED_STEM[:stem] + tuple(tail) or (1,),
        st.integers(0, len(SHARED_STEM)),
        st.lists(st.integers(1, 2), max_size=20),
    ),
    max_tokens=st.integers(0, 24),
    min_tokens=st.integers(0, 6),
    num_resumed=st.sampled_from([0, 0, 0, 2, 7, 99]),
    adapter=st.sampled_from([None, None, *ADAPTER_PAGES]),
    tenant_salt=st.sampled_from(["", "", "tenant"]),
    has_stop=st.booleans(),
    logprobs=optional(st.just(0)),
    prompt_logprobs=st.sampled_from([None, None, 0]),
    abort_after=optional(st.integers(0, 12)),
)


class Scenario:
    """Plays arrivals against a replica whose loads take random times, and keeps what must come out."""

    def __init__(self, replica, arrivals, load_failure_percent=0, removes_adapters=False):
        self.replica = replica
        self.arrivals = arrivals
        self.load_failure_percent = load_failure_percent
        self.removes_adapters = removes_adapters
        self.ended_from_outside = set()
        self.accepted = []
        self.step = 0
        for name, num_pages in ADAPTER_PAGES.items():
            replica.scheduler.add_adapter(make_manifest(name, num_pages))

    def play(self):
        due = 0
        aborts = []
        schedule = []
        for number, arrival in enumerate(self.arrivals):
            due += arrival.gap
            schedule.append((due, f"request-{number}", arrival))
        bound = 60 * sum(len(arrival.prompt) + arrival.max_tokens + 10 for arrival in self.arrivals) + 200
        while schedule or self.replica.scheduler.has_work:
            while schedule and schedule[0][0] <= self.step:
                _, name, arrival = schedule.pop(0)
                self.arrive(name, arrival)
                if arrival.abort_after is not None:
                    aborts.append((self.step + arrival.abort_after, name))
            for due, name in aborts:
                if due == self.step:
                    self.ended_from_outside.add(name)
                    self.replica.abort(name)
            self.churn_adapters()
            self.replica.step()
            self.step += 1
            assert self.step < bound, "starved"
        for digest in tuple(self.replica.device.loads):
            self.replica.end_load(digest)
        self.replica.drain()

    def arrive(self, name, arrival):
        request = arrival.request(name)
        try:
            self.replica.submit(request)
        except (InvalidRequest, NotFound):
            self.replica.truths.pop(name)
        else:
            self.accepted.append(name)

    def churn_adapters(self):
        """Loads that last some steps, now and then fail, and versions that are removed and come back."""
        chance = self.replica.noise.random
        for digest in tuple(self.replica.device.loads):
            if chance.randrange(3) == 0:
                fails = chance.randrange(100) < self.load_failure_percent
                self.replica.end_load(digest, "the file is gone" if fails else None)
        if self.removes_adapters and chance.randrange(4) == 0:
            name, num_pages = chance.choice(list(ADAPTER_PAGES.items()))
            self.replica.scheduler.remove_adapter(AdapterDigest(name))
            if chance.randrange(2):
                self.replica.scheduler.add_adapter(make_manifest(name, num_pages))

    def check(self):
        replica = self.replica
        for name in self.accepted:
            truth = replica.truths[name]
            reason = replica.finish_reason(name)
            if reason in (FinishReason.ABORT, FinishReason.ERROR):
                request = truth.request
                output = request.generated_token_ids + replica.output(name)
                assert output == truth.output[: len(output)]
            else:
                replica.check_stream(name)
        stats = replica.scheduler.stats()
        assert (stats.num_waiting, stats.num_running, stats.pages_kv_in_use) == (0, 0, 0)
        assert stats.pages_free + stats.pages_adapter + stats.pages_prefix_cache == stats.pages_total
        assert stats.prefix_hits_total <= stats.prefix_queries_total
        for name in ADAPTER_PAGES:
            replica.scheduler.remove_adapter(AdapterDigest(name))
        assert replica.scheduler.stats().pages_adapter == 0, "nobody refers to a removed version any more"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=14),
    num_pages=st.integers(8, 24),
    max_step_tokens=st.integers(4, 24),
    max_sequences=st.integers(1, 4),
    depth=st.integers(1, 3),
    noise_seed=st.integers(0, 1 << 16),
    partial_percent=st.sampled_from([0, 0, 20]),
    extra_percent=st.sampled_from([0, 0, 20]),
    error_percent=st.sampled_from([0, 0, 2]),
    load_failure_percent=st.sampled_from([0, 0, 30]),
    removes_adapters=st.booleans(),
)
def test_every_stream_is_what_its_request_gives_alone(
    arrivals, num_pages, max_step_tokens, max_sequences, depth, noise_seed, partial_percent, extra_percent,
    error_percent, load_failure_percent, removes_adapters,
):  # fmt: skip
    config = make_config(
        num_pages=num_pages,
        max_step_tokens=max(max_step_tokens, max_sequences),
        max_sequences=max_sequences,
        max_context_tokens=CONTEXT_TOKENS,
    )
    noise = Noise(random.Random(noise_seed), partial_percent, extra_percent, error_percent)
    scenario = Scenario(Replica(config, depth, noise), arrivals, load_failure_percent, removes_adapters)
    scenario.play()
    scenario.check()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depth", [1, 2])
def test_a_crowded_replica_that_preempts_and_reloads_still_gives_every_stream_exactly(seed, depth):
    chance = random.Random(seed)
    arrivals = [
        Arrival(
            gap=chance.randrange(2),
            prompt=SHARED_STEM[: chance.randrange(12)]
            + tuple(chance.randrange(1, 3) for _ in range(1 + chance.randrange(12))),
            max_tokens=chance.randrange(10, 26),
            min_tokens=0,
            num_resumed=0,
            adapter=chance.choice([None, *ADAPTER_PAGES]),
            tenant_salt="",
            has_stop=False,
            logprobs=None,
            prompt_logprobs=None,
            abort_after=None,
        )
        for _ in range(60)
    ]
    config = make_config(num_pages=16, max_step_tokens=16, max_sequences=6, max_context_tokens=CONTEXT_TOKENS)
    scenario = Scenario(Replica(config, depth, Noise(random.Random(seed), 5, 5)), arrivals)
    scenario.play()
    scenario.check()
    stats = scenario.replica.scheduler.stats()
    assert stats.preemptions_total > 0
    assert stats.prefix_hits_total > 0
    assert stats.adapter_loads_total > len(ADAPTER_PAGES), "an evicted adapter came back"
    assert all(scenario.replica.finish_reason(name) is FinishReason.LENGTH for name in scenario.accepted)


def test_the_truth_these_tests_compare_with_has_stops_and_tells_contexts_apart():
    outputs = {Truth(make_request("a", (1, 2, 1), 20, adapter=name), 100).output for name in (None, "x", "y")}
    assert len(outputs) == 3
    assert all(0 <= token < VOCABULARY for output in outputs for token in output)
    stopped = [Truth(make_request("a", (1, number), 40, stop=(0,)), 100) for number in range(10)]
    assert {truth.reason for truth in stopped} == {FinishReason.STOP}
