"""When an adapter is merged, in virtual time: the better mode of every mix is found, and found without flapping."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from rekindle.engine.scheduler.merging import (
    AdapterSize,
    MergeChoice,
    MergeOutcome,
    MergePolicy,
    MergeState,
    StepMix,
)
from rekindle.engine.scheduler.plan import StepPlan
from rekindle.engine.scheduler.scheduler import Scheduler
from rekindle.protocol.identity import AdapterDigest
from support.policies import ToldPolicy
from support.scheduling import Replica, make_config, make_manifest, make_request

NUM_ADAPTERS = 32
ADAPTERS = [AdapterDigest(f"adapter-{i}") for i in range(NUM_ADAPTERS)]
FAVOURITE = ADAPTERS[0]
SIZE = AdapterSize(lora_bytes=5_000_000, merge_bytes=200_000_000)
STEP_S = 0.015
BUILD_SHARE = 0.25


@dataclass(frozen=True)
class Device:
    """What updates really cost, which the policy does not know: per pass, per byte, and per byte and row."""

    pass_s: float
    byte_s: float
    work_s: float
    write_s_per_byte: float = 2.5e-9
    noise: float = 0.2

    def lora_s(self, mix: StepMix, merged: AdapterDigest | None) -> float:
        own = {digest: rows for digest, rows in mix.rows_of.items() if digest != merged}
        num_others = 0 if merged is None else mix.num_rows - mix.rows_of.get(merged, 0)
        num_passes = bool(own) + bool(num_others)
        num_bytes = SIZE.lora_bytes * (len(own) + bool(num_others))
        work = SIZE.lora_bytes * (sum(own.values()) + num_others)
        return num_passes * self.pass_s + num_bytes * self.byte_s + work * self.work_s


DEVICES = {
    "calls cost most": Device(2e-3, 2e-11, 1e-12),
    "reading costs most": Device(2e-4, 2e-10, 1e-12),
    "arithmetic costs most": Device(2e-4, 2e-11, 3e-11),
    "updates cost next to nothing": Device(1e-5, 1e-13, 1e-14),
}
MIXES: dict[str, float | None] = {"100%": 1.0, "95%": 0.95, "60%": 0.6, "uniform 32": None}


def mixes(share: float | None, concurrency: int, seed: int) -> Iterator[StepMix]:
    """Steps of a closed loop: most sequences decode, some begin with a prompt of 64 tokens."""
    draw = random.Random(seed)

    def adapter() -> AdapterDigest | None:
        if share is None:
            return draw.choice(ADAPTERS)
        return FAVOURITE if draw.random() < share else draw.choice([None, *ADAPTERS[1:8]])

    running = [adapter() for _ in range(concurrency)]
    while True:
        rows_of: dict[AdapterDigest, int] = {}
        num_rows = 0
        for i in range(concurrency):
            rows = 1
            if draw.random() < 1 / 48:
                running[i], rows = adapter(), 64
            digest = running[i]
            num_rows += rows
            if digest is not None:
                rows_of[digest] = rows_of.get(digest, 0) + rows
        yield StepMix(rows_of, num_rows)


def make_policy(in_place: bool = False) -> MergePolicy:
    policy = MergePolicy(1e-9, in_place=in_place)
    for adapter in ADAPTERS:
        policy.add(adapter, SIZE)
    return policy


class Run:
    """Steps under a policy on a device, and what they took."""

    def __init__(self, device: Device, policy: MergePolicy, seed: int = 0) -> None:
        self.device, self.policy = device, policy
        self.now_s = 0.0
        self.choices: list[MergeChoice] = []
        self.num_writes = 0
        self._draw = random.Random(seed)
        self._left_s: dict[AdapterDigest, float] = {}
        self._written: AdapterDigest | None = None

    def copy(self, mix: StepMix) -> None:
        """A step of an engine that keeps copies."""
        choice = self.policy.choose(mix, self.now_s)
        step_s = self._run(choice, mix)
        if choice.build is not None:
            left_s = self._left_s.setdefault(choice.build, self.device.write_s_per_byte * SIZE.merge_bytes)
            took_s = min(BUILD_SHARE * step_s, left_s)
            self._left_s[choice.build] -= took_s
            self.now_s += took_s
            if self._left_s[choice.build] <= 0:
                self._tell_ready(choice.build)

    def in_place(self, mix: StepMix) -> None:
        """A step of an engine that writes to its weights."""
        choice = self.policy.choose(mix, self.now_s)
        if choice.merged != self._written:
            num_writes = (self._written is not None) + (choice.merged is not None)
            self.now_s += num_writes * self.device.write_s_per_byte * SIZE.merge_bytes
            if self._written is not None:
                seconds = self.device.write_s_per_byte * SIZE.merge_bytes
                restored = MergeOutcome(self._written, MergeState.RESTORED, seconds, SIZE.merge_bytes)
                self.policy.note_outcome(restored)
            self._written = choice.merged
            if choice.merged is not None:
                self._tell_ready(choice.merged)
        self._run(choice, mix)

    @property
    def num_changes(self) -> int:
        """How often one step's mode differed from that of the step before."""
        modes = [choice.merged for choice in self.choices]
        return sum(left != right for left, right in itertools.pairwise(modes))

    def _run(self, choice: MergeChoice, mix: StepMix) -> float:
        self.choices.append(choice)
        lora_s = self.device.lora_s(mix, choice.merged) * self._draw.lognormvariate(0.0, self.device.noise)
        self.policy.note_step(mix, choice.merged, lora_s)
        self.now_s += STEP_S + lora_s
        return STEP_S + lora_s

    def _tell_ready(self, digest: AdapterDigest) -> None:
        seconds = self.device.write_s_per_byte * SIZE.merge_bytes
        self.policy.note_outcome(MergeOutcome(digest, MergeState.READY, seconds, SIZE.merge_bytes))
        self.num_writes += 1


def fixed_s(device: Device, steps: list[StepMix], merged: AdapterDigest | None) -> float:
    """What the steps take if an adapter is merged whenever it has rows, or if none ever is."""
    return sum(
        STEP_S + device.lora_s(mix, merged if merged in mix.rows_of else None) * 1.0202  # the mean of the noise
        for mix in steps
    )


def take(stream: Iterator[StepMix], count: int) -> list[StepMix]:
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize("concurrency", [8, 32])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("device", DEVICES)
def test_copies_make_every_mix_as_fast_as_the_better_of_always_and_never(
    device: str, mix: str, concurrency: int
) -> None:
    """The writing of copies included."""
    steps = take(mixes(MIXES[mix], concurrency, seed=1), 4000)
    run = Run(DEVICES[device], make_policy())
    for step in steps:
        run.copy(step)
    never_s, always_s = (fixed_s(DEVICES[device], steps, merged) for merged in (None, FAVOURITE))
    assert run.now_s <= 1.05 * min(never_s, always_s)


@pytest.mark.parametrize("mix", ["100%", "60%", "uniform 32"])
@pytest.mark.parametrize("device", DEVICES)
def test_in_place_every_lasting_mix_is_as_fast_as_the_better_of_always_and_never(device: str, mix: str) -> None:
    steps = take(mixes(MIXES[mix], 32, seed=2), 4000)
    run = Run(DEVICES[device], make_policy(in_place=True))
    for step in steps:
        run.in_place(step)
    never_s, always_s = (fixed_s(DEVICES[device], steps, merged) for merged in (None, FAVOURITE))
    assert run.now_s <= 1.05 * min(never_s, always_s)


def test_an_adapter_that_owns_all_rows_is_merged_and_a_crowd_is_not() -> None:
    device = DEVICES["reading costs most"]
    alone, crowd = Run(device, make_policy()), Run(device, make_policy())
    for step in take(mixes(1.0, 8, seed=3), 3000):
        alone.copy(step)
    for step in take(mixes(None, 32, seed=3), 3000):
        crowd.copy(step)
    assert [choice.merged for choice in alone.choices[-100:]] == [FAVOURITE] * 100
    assert not any(choice.merged for choice in crowd.choices[-100:])
    assert crowd.num_writes == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_own", [8, 16, 24, 29, 31])
def test_a_steady_mix_does_not_make_the_mode_flap(device: str, num_own: int, seed: int) -> None:
    """However near the two modes are, and although every measurement is off by a fifth."""
    mix = StepMix({FAVOURITE: num_own, ADAPTERS[1]: 32 - num_own}, 32)
    run = Run(DEVICES[device], make_policy(), seed)
    for _ in range(3000):
        run.copy(mix)
    assert run.num_changes <= 3


def test_in_place_switching_costs_no_more_than_the_waiting_for_it_has_lost() -> None:
    """Two adapters that take turns, each too briefly to pay for itself, and then long enough."""
    device = DEVICES["reading costs most"]
    price_s = device.write_s_per_byte * SIZE.merge_bytes
    gain_s = device.lora_s(StepMix({FAVOURITE: 8}, 8), None)
    for turn in (10, round(10 * price_s / gain_s)):
        run = Run(device, make_policy(in_place=True))
        lost_s = 0.0
        for i in range(8 * turn):
            mix = StepMix({ADAPTERS[i // turn % 2]: 8}, 8)
            run.in_place(mix)
            lost_s += device.lora_s(mix, run.choices[-1].merged) * 1.5
        assert run.num_writes * price_s <= lost_s
        assert (run.num_writes > 0) == (turn > 10)


def test_in_place_a_step_without_rows_of_the_merged_adapter_leaves_it_at_once() -> None:
    run = Run(DEVICES["reading costs most"], make_policy(in_place=True))
    while not (run.choices and run.choices[-1].merged):
        run.in_place(StepMix({FAVOURITE: 8}, 8))
    run.in_place(StepMix({}, 8))
    assert run.choices[-1].merged is None


def test_in_place_leaving_is_priced_at_what_restoring_the_weights_took() -> None:
    """Others' rows come to outnumber those of the merged adapter, which is worth leaving."""
    waited = []
    for restore_s in (0.5, 5.0):
        run = Run(DEVICES["reading costs most"], make_policy(in_place=True))
        while not (run.choices and run.choices[-1].merged):
            run.in_place(StepMix({FAVOURITE: 8}, 8))
        run.policy.note_outcome(MergeOutcome(FAVOURITE, MergeState.RESTORED, restore_s, SIZE.merge_bytes))
        first = len(run.choices)
        while run.choices[-1].merged:
            run.in_place(StepMix({FAVOURITE: 1}, 32))
        waited.append(len(run.choices) - first)
    assert waited[1] == pytest.approx(10 * waited[0], rel=0.1)


def ready_policy() -> MergePolicy:
    run = Run(DEVICES["reading costs most"], make_policy())
    while run.policy.merged is None:
        run.copy(StepMix({FAVOURITE: 8}, 8))
    return run.policy


def test_a_copy_is_used_again_at_once_when_its_adapter_comes_back() -> None:
    policy = ready_policy()
    assert policy.choose(StepMix({ADAPTERS[1]: 8}, 8), 1000.0).merged is None
    assert policy.choose(StepMix({FAVOURITE: 8}, 8), 1000.1).merged == FAVOURITE


@pytest.mark.parametrize(
    "end",
    [
        lambda policy: policy.remove(FAVOURITE),
        lambda policy: policy.note_outcome(MergeOutcome(FAVOURITE, MergeState.DROPPED)),
        lambda policy: policy.note_outcome(MergeOutcome(FAVOURITE, MergeState.REFUSED, reason="it is too large")),
    ],
    ids=["removed", "dropped", "refused"],
)
def test_an_adapter_whose_copy_is_gone_is_not_merged(end: Callable[[MergePolicy], None]) -> None:
    policy = ready_policy()
    end(policy)
    choice = policy.choose(StepMix({FAVOURITE: 8}, 8), 1000.0)
    assert (choice.merged, choice.build) == (None, None)


def test_a_refused_adapter_is_not_tried_again_and_a_dropped_one_must_earn_its_copy_anew() -> None:
    for state in (MergeState.REFUSED, MergeState.DROPPED):
        policy = ready_policy()
        policy.note_outcome(MergeOutcome(FAVOURITE, state))
        orders = [policy.choose(StepMix({FAVOURITE: 8}, 8), 1000.0 + i * 0.01).build for i in range(3000)]
        assert orders[0] is None
        assert (FAVOURITE in orders) == (state is MergeState.DROPPED)


def test_a_copy_is_abandoned_when_its_adapter_stays_away() -> None:
    run = Run(DEVICES["reading costs most"], make_policy())
    while not (run.choices and run.choices[-1].build):
        run.copy(StepMix({FAVOURITE: 8}, 8))
    assert run.policy.choose(StepMix({}, 8), run.now_s + 1.0).build == FAVOURITE
    late = run.policy.choose(StepMix({}, 8), run.now_s + 3600.0)
    assert late.build is None
    assert any("not to be merged any more" in reason for reason in late.reasons)


def test_the_plan_says_why_an_adapter_is_merged() -> None:
    run = Run(DEVICES["reading costs most"], make_policy())
    while run.policy.merged is None:
        run.copy(StepMix({FAVOURITE: 8}, 8))
    run.copy(StepMix({}, 8))
    reasons = [reason for choice in run.choices for reason in choice.reasons]
    assert [("to be merged" in reason, "saves" in reason, "nothing" in reason) for reason in reasons] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


def test_merging_delays_nobody_since_all_rows_share_every_batch() -> None:
    """The sequences of every plan are the same with an adapter merged throughout and without."""

    def rows(plan: StepPlan) -> list[tuple[object, ...]]:
        return [(it.request.request_id, it.start, it.token_ids, it.pages) for it in plan.sequences]

    def plans(policy: ToldPolicy | None) -> list[tuple[object, ...]]:
        config = make_config(num_pages=24, max_sequences=4)
        replica = Replica(config)
        replica.scheduler = Scheduler(config, policy)
        for name in ("a", "b"):
            replica.scheduler.add_adapter(make_manifest(name))
        for i in range(30):
            replica.submit(make_request(f"r{i}", 3 + i % 9, adapter=(None, "a", "a", "a", "b")[i % 5]))
        replica.run()
        return [(rows(plan), plan.loads, plan.evicted, plan.preempted) for plan in replica.plans]

    policy = ToldPolicy()
    policy.target = AdapterDigest("a")
    policy.note_outcome(MergeOutcome(policy.target, MergeState.READY))
    assert plans(policy) == plans(None)
    assert policy.num_merged_steps > 20
