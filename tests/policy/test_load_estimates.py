"""What is said of load times before they are known, on series as machines give them and on hostile ones."""

import math
import random
from statistics import median

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.policy.load_estimates import MAX_STAGES, WINDOW, LoadEstimates, StageModel
from rekindle.protocol.estimates import StageEstimate
from rekindle.units import GIB, MIB

PROMISED = 0.1
LOADS_TO_LEARN = 10
NUM_SERIES = 30

SIZES = {
    "from 1 MB to 1 GB": lambda chance: int(2 ** chance.uniform(20, 30)),
    "three sizes": lambda chance: chance.choice([16 * MIB, 64 * MIB, 256 * MIB]),
    "nearly one size": lambda chance: int(64 * MIB * chance.uniform(0.97, 1.03)),
    "one size": lambda chance: 64 * MIB,
}
STAGES = {
    "a fast disk": (0.005, 2e9),
    "memory": (1e-5, 2e10),
    "a bucket": (0.2, 1e8),
    "all fixed": (2.0, 1e12),
    "nothing fixed": (0.0, 3e8),
}


def observations(chance, stage, sizes, sigma, outlier_share=0.0, outliers=(0.1, 5.0, 10.0)):
    """(bytes, seconds) without end: lognormal noise, and a share of loads that took some times too long or little."""
    fixed_s, bytes_per_s = stage
    while True:
        num_bytes = sizes(chance)
        factor = chance.choice(outliers) if chance.random() < outlier_share else 1.0
        yield num_bytes, factor * (fixed_s + num_bytes / bytes_per_s) * math.exp(chance.gauss(0.0, sigma))


def errors_after_learning(series, num_to_learn=LOADS_TO_LEARN, num_further=10, model=None):
    """Relative errors of the predictions that follow so many loads, each made before its load is known."""
    model = model or StageModel("any")
    errors = []
    for number, (num_bytes, seconds) in zip(range(num_to_learn + num_further), series, strict=False):
        if number >= num_to_learn:
            errors.append(abs(model.seconds(num_bytes) - seconds) / seconds)
        model.observe(num_bytes, seconds)
    return errors


def median_error(stage, sizes, sigma, **outliers):
    errors = []
    for seed in range(NUM_SERIES):
        errors += errors_after_learning(observations(random.Random(seed), stage, sizes, sigma, **outliers))
    return median(errors)


@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_after_ten_loads_predictions_are_within_a_tenth_at_the_median(stage, sizes, sigma):
    assert median_error(stage, sizes, sigma) < PROMISED


@pytest.mark.parametrize("outliers", [(0.1, 5.0, 10.0), (0.1,), (8.0,)], ids=["both", "cached files", "a busy machine"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_one_load_in_five_that_is_something_else_does_not_spoil_the_others(stage, sizes, outliers):
    assert median_error(stage, sizes, 0.05, outlier_share=0.2, outliers=outliers) < PROMISED


@pytest.mark.parametrize("factor", [0.25, 4.0])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_ten_loads_after_a_disk_changed_its_speed_it_is_known(sizes, factor):
    before, after = (0.005, 2e9), (0.005 / factor, 2e9 * factor)
    errors = []
    for seed in range(NUM_SERIES):
        chance = random.Random(seed)
        model = StageModel("any")
        errors_after_learning(observations(chance, before, sizes, 0.05), 3 * WINDOW, 0, model)
        errors += errors_after_learning(observations(chance, after, sizes, 0.05), model=model)
    assert median(errors) < PROMISED


def test_a_size_never_seen_is_extrapolated_from_two_others():
    model = StageModel("any")
    series = observations(random.Random(1), (0.05, 1e9), lambda chance: chance.choice([MIB, 256 * MIB]), 0.02)
    errors_after_learning(series, 20, 0, model)
    assert model.seconds(4 * GIB) == pytest.approx(0.05 + 4 * GIB / 1e9, rel=PROMISED)
    assert model.fixed_s == pytest.approx(0.05, rel=2 * PROMISED)


def test_before_any_load_the_first_guess_is_told_and_no_error_is():
    model = StageModel("any", 0.01, 1e8)
    assert model.estimate() == StageEstimate("any", 0.01, None, 0, None)
    assert model.seconds(int(1e8)) == pytest.approx(1.01)


@given(st.integers(0, 33), st.floats(0.01, 100.0), st.integers(1, 50))
def test_loads_of_one_size_are_known_and_larger_ones_take_longer_in_proportion_at_most(log_bytes, seconds, num_loads):
    model = StageModel("any")
    for _ in range(num_loads):
        model.observe(1 << log_bytes, seconds)
    assert model.seconds(1 << log_bytes) == pytest.approx(seconds)
    assert seconds <= model.seconds(8 << log_bytes) * (1 + 1e-9)
    assert model.seconds(8 << log_bytes) <= 8 * seconds * (1 + 1e-9)


hostile = st.tuples(
    st.one_of(st.sampled_from([0, 1, 1 << 200, -5]), st.integers(0, 1 << 50)),
    st.one_of(st.sampled_from([0.0, -1.0, 1e300, math.inf, -math.inf, math.nan]), st.floats(0.0, 1e6)),
)


@given(st.lists(hostile, max_size=3 * WINDOW))
def test_nothing_that_is_observed_makes_an_estimate_absurd(series):
    model = StageModel("any")
    for num_bytes, seconds in series:
        model.observe(num_bytes, seconds)
        known = model.estimate()
        assert 0.0 <= known.fixed_s <= 3600.0
        assert known.bytes_per_s is None or 1e4 <= known.bytes_per_s <= 1e13
        assert known.error is None or 0.0 <= known.error < math.inf
        predictions = [model.seconds(size) for size in (-1, 0, 1, MIB, GIB, 1 << 200)]
        assert predictions == sorted(predictions)
        assert predictions[0] >= 0.0
        assert predictions[-1] < math.inf


@given(st.lists(hostile, max_size=4), st.integers(0, 1 << 32))
def test_a_few_hostile_observations_before_true_ones_move_an_estimate_by_less_than_a_factor_of_two(wrong, seed):
    model = StageModel("any")
    true = observations(random.Random(seed), (0.01, 1e9), SIZES["from 1 MB to 1 GB"], 0.0)
    for num_bytes, seconds in [*wrong, *(next(true) for _ in range(20))]:
        model.observe(num_bytes, seconds)
    assert 0.5 < model.seconds(128 * MIB) / (0.01 + 128 * MIB / 1e9) < 2.0


def test_the_error_told_is_that_of_the_predictions_made_before_each_of_the_latest_loads():
    model = StageModel("any", 0.0, 1e9)
    seen = []
    for num_bytes, seconds in observations(random.Random(3), (0.01, 5e8), SIZES["three sizes"], 0.2):
        seen.append(abs(model.seconds(num_bytes) - seconds) / seconds)
        model.observe(num_bytes, seconds)
        assert model.estimate().error == pytest.approx(median(seen[-WINDOW:]))
        assert model.estimate().num_observations == len(seen)
        if len(seen) == 2 * WINDOW:
            break


def test_what_is_known_can_be_stored_and_goes_on_as_if_it_had_not_been():
    model = StageModel("any")
    series = observations(random.Random(4), (0.01, 5e8), SIZES["from 1 MB to 1 GB"], 0.1)
    errors_after_learning(series, 3 * WINDOW, 0, model)
    assert len(model.recent) == WINDOW
    stored = msgspec.msgpack.encode(model)
    assert len(stored) < 32 * WINDOW
    copy = msgspec.msgpack.decode(stored, type=StageModel)
    for num_bytes, seconds in (next(series) for _ in range(5)):
        model.observe(num_bytes, seconds)
        copy.observe(num_bytes, seconds)
    assert copy == model


def test_the_time_through_several_stages_is_their_sum():
    estimates = LoadEstimates([StageModel("remote", 0.1, 1e8), StageModel("disk", 0.01, 1e9)])
    assert estimates.seconds([("remote", 10**8), ("disk", 10**9)]) == pytest.approx(1.1 + 1.01)
    assert estimates.seconds([]) == 0.0


def test_stages_are_told_by_name_and_begin_with_their_first_guesses():
    estimates = LoadEstimates([StageModel("slow", 1.0, 1e6)])
    estimates.observe("fast", MIB, 0.001)
    fast, slow = estimates.snapshot()
    assert (fast.stage, fast.num_observations, fast.error is None) == ("fast", 1, False)
    assert slow == StageEstimate("slow", 1.0, None, 0, None)


def test_where_no_bytes_are_brought_all_is_fixed_and_no_rate_is_told():
    model = StageModel("imports")
    for _ in range(3):
        model.observe(0, 1.5)
    assert model.estimate() == StageEstimate("imports", pytest.approx(1.5), None, 3, pytest.approx(0.0))


def test_what_is_known_elsewhere_is_a_first_guess_that_rests_on_nothing():
    known = (StageEstimate("disk", 0.5, 1e7, 40, 0.03), StageEstimate("imports", 1.5, None, 3, 0.1))
    estimates = LoadEstimates.guessed(known)
    assert estimates["disk"].seconds(10**7) == pytest.approx(1.5)
    assert [it.num_observations for it in estimates.snapshot()] == [0]


def test_of_too_many_stages_the_one_longest_unobserved_is_forgotten():
    estimates = LoadEstimates()
    for number in range(MAX_STAGES):
        estimates.observe(f"stage {number}", MIB, 1.0)
    estimates.observe("stage 0", MIB, 1.0)
    estimates.observe("one more", MIB, 1.0)
    names = {known.stage for known in estimates.snapshot()}
    assert len(names) == MAX_STAGES
    assert names >= {"stage 0", "one more"}
    assert "stage 1" not in names
