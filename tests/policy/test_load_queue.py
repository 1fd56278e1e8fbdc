"""When loads that are carried out one after another will have ended."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.policy.load_estimates import LoadEstimates, StageModel
from rekindle.policy.load_queue import LoadQueue, LoadTiming
from rekindle.units import MIB

FIXED_S, BYTES_PER_S = 0.01, 5e8


def true_s(num_bytes):
    return FIXED_S + num_bytes / BYTES_PER_S


def knowing_queue():
    return LoadQueue(LoadEstimates([StageModel("disk", FIXED_S, BYTES_PER_S)]))


def test_load_times_are_learnt_from_loads_that_are_carried_out_one_after_another():
    queue = LoadQueue(LoadEstimates())
    chance = random.Random(1)
    now_s = 0.0
    for spell in range(20):
        loads = {f"{spell}-{i}": chance.randrange(1 << 20, 1 << 28) for i in range(3)}
        for key, num_bytes in loads.items():
            queue.begin(key, "disk", num_bytes, now_s)
        for key, num_bytes in loads.items():
            now_s += true_s(num_bytes)
            queue.end(key, now_s, succeeded=True)
        now_s += 1.0
    assert queue.estimates["disk"].seconds(1 << 26) == pytest.approx(true_s(1 << 26), rel=0.05)
    assert queue.load_s_total == pytest.approx(now_s - 20.0)
    assert queue.num_begun == 60


@given(st.lists(st.integers(1, 1 << 30), min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_what_is_left_of_loads_under_way_is_when_they_end(sizes, share_done):
    queue = knowing_queue()
    for key, num_bytes in enumerate(sizes):
        queue.begin(key, "disk", num_bytes, 5.0)
    now_s = 5.0
    for key, num_bytes in enumerate(sizes):
        partly_s = share_done * true_s(num_bytes)
        left = queue.seconds_left(now_s + partly_s)
        assert list(left) == list(range(key, len(sizes)))
        ends = [sum(true_s(it) for it in sizes[key : last + 1]) for last in range(key, len(sizes))]
        assert list(left.values()) == pytest.approx([end_s - partly_s for end_s in ends], abs=1e-6)
        now_s += true_s(num_bytes)
        queue.end(key, now_s, succeeded=True)
    assert queue.seconds_left(now_s) == {}


def test_a_load_that_takes_longer_than_it_should_is_expected_at_any_moment_and_the_next_after_it():
    queue = knowing_queue()
    queue.begin("late", "disk", 100 * MIB, 0.0)
    queue.begin("next", "disk", 10 * MIB, 0.0)
    assert queue.seconds_left(60.0) == {"late": 0.0, "next": pytest.approx(true_s(10 * MIB))}


def test_loads_through_several_stages_wait_for_each_other():
    queue = LoadQueue(LoadEstimates([StageModel("remote", 2.0, 1e8), StageModel("disk", 1.0, 1e8)]))
    queue.begin("far", "remote", 10**8, 0.0)
    queue.begin("near", "disk", 10**8, 0.0)
    assert queue.seconds_left(0.0) == {"far": pytest.approx(3.0), "near": pytest.approx(5.0)}


def test_a_load_that_failed_teaches_nothing_but_its_time_counts():
    queue = knowing_queue()
    before = queue.estimates.snapshot()
    queue.begin("a", "disk", MIB, 0.0)
    queue.end("a", 30.0, succeeded=False)
    assert queue.estimates.snapshot() == before
    assert queue.load_s_total == 30.0


def test_a_timing_tells_waiting_and_loading_apart_however_late_the_end_is_told():
    queue = knowing_queue()
    queue.begin("a", "disk", MIB, 0.0)
    queue.begin("b", "disk", MIB, 0.0)
    queue.end("a", 9.0, succeeded=True, timing=LoadTiming(0.0, 0.5))
    queue.end("b", 9.0, succeeded=True, timing=LoadTiming(0.5, 0.5))
    assert (queue.queued_s_total, queue.load_s_total) == (0.5, 1.0)
    assert queue.estimates["disk"].seconds(MIB) == pytest.approx(0.5)


def test_the_next_load_counts_as_begun_when_the_one_before_had_ended_not_when_that_was_told():
    queue = knowing_queue()
    queue.begin("a", "disk", 100 * MIB, 0.0)
    queue.begin("b", "disk", 100 * MIB, 0.0)
    load_s = true_s(100 * MIB)
    now_s = 1.5 * load_s
    queue.end("a", now_s, succeeded=True, timing=LoadTiming(0.0, load_s))
    assert queue.seconds_left(now_s) == {"b": pytest.approx(load_s / 2)}
