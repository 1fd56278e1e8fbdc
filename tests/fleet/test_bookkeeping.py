"""What an engine is told of adapters, when a dead engine is replaced, and which states follow which."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rekindle.clock import ManualClock
from rekindle.errors import InternalError, NotFound, Overloaded
from rekindle.fleet.admission import Admission
from rekindle.fleet.known_adapters import KnownAdapters
from rekindle.fleet.state import ReplicaState, check_transition
from rekindle.fleet.supervision import RestartPolicy, Supervision
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.replica import AddAdapter, RemoveAdapter
from support.replicas import ADAPTER, engine_settings

DIGESTS = [AdapterDigest(letter * 64) for letter in "abc"]


class Adapters(RuleBasedStateMachine):
    """An engine that is told everything knows what is wanted and what is still in use, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.known = KnownAdapters()
        self.wanted: set[AdapterDigest] = set()
        self.users: list[AdapterDigest] = []
        self.engine: set[AdapterDigest] = set()

    @rule(digest=st.sampled_from(DIGESTS))
    def add(self, digest: AdapterDigest) -> None:
        self.known.add(replace(ADAPTER, digest=digest), "/nonexistent")
        self.wanted.add(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def remove(self, digest: AdapterDigest) -> None:
        self.known.remove(digest)
        self.wanted.discard(digest)

    @rule(digest=st.sampled_from(DIGESTS))
    def acquire(self, digest: AdapterDigest) -> None:
        if digest in self.wanted:
            self.known.acquire(digest)
            self.users.append(digest)
        else:
            with pytest.raises(NotFound):
                self.known.acquire(digest)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.known.release(self.users.pop(data.draw(st.integers(0, len(self.users) - 1))))

    @rule()
    def lose_engine(self) -> None:
        self.known.engine_lost()
        self.engine.clear()

    @rule()
    def tell(self) -> None:
        while (message := self.known.take_next()) is not None:
            if isinstance(message, AddAdapter):
                self.engine.add(message.manifest.digest)
            else:
                self.engine.remove(message.digest)
        assert self.engine == self.wanted | set(self.users)

    @invariant()
    def what_is_told_is_bounded(self) -> None:
        assert len(self.known._untold) <= len(DIGESTS)


TestAdapters = Adapters.TestCase


def test_a_version_that_comes_and_goes_between_two_messages_is_still_taken_back() -> None:
    known = KnownAdapters()
    known.add(ADAPTER, "/file")
    assert known.take_next() == AddAdapter(ADAPTER, "/file")
    known.remove(ADAPTER.digest)
    known.add(ADAPTER, "/file")
    known.remove(ADAPTER.digest)
    assert known.take_next() == RemoveAdapter(ADAPTER.digest)
    assert known.take_next() is None


def test_a_version_whose_file_has_moved_is_told_again() -> None:
    known = KnownAdapters()
    for path in ("/old", "/old", "/new"):
        known.add(ADAPTER, path)
        message = known.take_next()
        assert message is None or isinstance(message, AddAdapter)
    assert message == AddAdapter(ADAPTER, "/new")


def test_a_fruitful_engine_is_replaced_at_once_and_fruitless_ones_ever_later() -> None:
    policy = RestartPolicy(Supervision(backoff_s=1.0, max_backoff_s=5.0, max_fruitless_crashes=3, window_s=100.0))
    assert policy.crashed(0.0, was_fruitful=True) == 0.0
    delays = [policy.crashed(float(now_s), was_fruitful=False) for now_s in range(5)]
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert policy.is_hopeless
    assert policy.retry_after_s(5.0) == pytest.approx(9.0 - 5.0 + 1.0)
    assert policy.crashed(6.0, was_fruitful=True) == 0.0
    assert not policy.is_hopeless


def test_crashes_long_ago_do_not_count() -> None:
    policy = RestartPolicy(Supervision(backoff_s=1.0, max_fruitless_crashes=2, window_s=100.0))
    for now_s in (0.0, 101.0, 202.0, 303.0):
        assert policy.crashed(now_s, was_fruitful=False) == 1.0
        assert not policy.is_hopeless


@given(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=200))
def test_a_wait_is_never_longer_than_the_longest(crashes: list[tuple[float, bool]]) -> None:
    limits = Supervision()
    policy, now_s = RestartPolicy(limits), 0.0
    for pause_s, was_fruitful in crashes:
        now_s += pause_s
        assert 0.0 <= policy.crashed(now_s, was_fruitful=was_fruitful) <= limits.max_backoff_s


def test_a_full_replica_says_when_to_come_back_from_the_rate_at_which_requests_end() -> None:
    clock = ManualClock()
    admission = Admission(engine_settings(max_sequences=2, max_queued=1), clock)
    admission.check(3)
    for _ in range(50):
        clock.advance(4.0)
        admission.note_departure(2)
    with pytest.raises(Overloaded, match="4 requests are open and 4 may be") as met:
        admission.check(4)
    assert met.value.retry_after_s == pytest.approx(4.0, rel=0.05)


def test_a_stopped_replica_stays_stopped() -> None:
    for state in ReplicaState:
        with pytest.raises(InternalError, match=f"stopped cannot become {state.value}"):
            check_transition(ReplicaState.STOPPED, state)
