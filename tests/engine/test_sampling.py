"""Choosing tokens: filters, penalties, seeds and log-probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.engine.sampling import SampleRow, sample, uniform
from rekindle.errors import InvalidRequest
from rekindle.protocol.sampling import SamplingParams


def params(**changes: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 10, "seed": 1, "temperature": 1.0, **changes})  # type: ignore[arg-type]


def draw(logits: torch.Tensor, num_draws: int, **changes: object) -> list[int]:
    rows = [SampleRow(params(seed=seed, **changes), (1, 2), ()) for seed in range(num_draws)]
    return [chosen.token_id for chosen in sample(logits.expand(num_draws, -1), rows)]


def test_greedy_takes_the_likeliest_token_of_each_row() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    rows = [SampleRow(params(temperature=0.0), (), ())] * 2
    assert [chosen.token_id for chosen in sample(logits, rows)] == [1, 0]


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    counts = torch.bincount(torch.tensor(draw(logits, 4000)), minlength=3) / 4000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.03)


def test_temperature_sharpens_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    weights = torch.tensor([0.25, 0.09, 0.04])
    counts = torch.bincount(torch.tensor(draw(logits, 4000, temperature=0.5)), minlength=3) / 4000
    assert torch.allclose(counts, weights / weights.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.75}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"min_p": 0.5}, {0, 1}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),
        ({"top_k": 2, "min_p": 0.7}, {0}),
        ({"min_p": 0.5, "top_p": 0.6}, {0}),
        ({"min_p": 0.2, "top_p": 0.9}, {0, 1, 2}),
    ],
)
def test_filters_keep_exactly_the_tokens_they_should(filters: dict[str, float], kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draw(logits, 400, **filters)) == kept


@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-38, 1e-46, 1e-320])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 2}])
def test_a_temperature_near_zero_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    logits = torch.tensor([1.0, 9.0, 3.0, 2.0])
    assert set(draw(logits, 20, temperature=temperature, **filters)) == {1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_leaves_no_token_to_choose_ends_with_an_error(temperature: float) -> None:
    everything = params(temperature=temperature, min_tokens=2, stop_token_ids=(0, 1, 2, 3, 9))
    stuck, free = sample(torch.zeros(2, 4), [SampleRow(everything, (), ()), SampleRow(params(), (), ())])
    assert "no token" in (stuck.error or "")
    assert free.error is None


def test_a_bias_comes_before_the_repetition_penalty() -> None:
    logits = torch.tensor([[-1.0, 3.5, 0.0]])
    row = SampleRow(params(temperature=0.0, logit_bias=((0, 9.0),), repetition_penalty=2.0), prompt=(0,), generated=())
    assert sample(logits, [row])[0].token_id == 0


@pytest.mark.parametrize("filters", [{"top_p": 0.999}, {"min_p": 1e-9}, {"top_k": 3000, "top_p": 0.9999}])
def test_flat_distributions_are_sampled_beyond_the_first_candidates(filters: dict[str, float]) -> None:
    seen = draw(torch.zeros(5000), 300, **filters)
    assert max(seen) > 1024
    assert len(set(seen)) > 200


def test_a_draw_depends_on_seed_and_position_only() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    alone = sample(logits, [SampleRow(params(seed=7), (1, 2), (3,))])[0]
    crowd = sample(
        torch.cat([torch.zeros(3, 50), logits]),
        [SampleRow(params(seed=s), (1,), ()) for s in range(3)] + [SampleRow(params(seed=7), (1,), (2, 3))],
    )[3]
    assert alone.token_id == crowd.token_id


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**40))
def test_uniform_numbers_lie_in_the_half_open_unit_interval(seed: int, position: int) -> None:
    assert 0.0 <= uniform(seed, position) < 1.0


def test_uniform_numbers_are_spread_evenly() -> None:
    values = torch.tensor([uniform(3, position) for position in range(10_000)])
    assert abs(float(values.mean()) - 0.5) < 0.01
    assert abs(float(values.var()) - 1 / 12) < 0.005


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, 1.8]])
    row = SampleRow(params(temperature=0.0, repetition_penalty=1.2), prompt=(0,), generated=(1,))
    assert sample(logits, [row])[0].token_id == 3


def test_presence_and_frequency_penalties_count_output_only() -> None:
    logits = torch.tensor([[2.0, 1.5, 1.4]])
    greedy = {"temperature": 0.0}
    assert sample(logits, [SampleRow(params(**greedy, presence_penalty=1.0), (0,), ())])[0].token_id == 0
    assert sample(logits, [SampleRow(params(**greedy, presence_penalty=1.0), (), (0,))])[0].token_id == 1
    assert sample(logits, [SampleRow(params(**greedy, frequency_penalty=0.4), (), (0, 0, 1))])[0].token_id == 2


def test_logit_bias_can_force_and_forbid_a_token() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0]])
    biased = params(temperature=0.0, logit_bias=((0, -100.0), (2, 5.0)))
    assert sample(logits, [SampleRow(biased, (), ())])[0].token_id == 2


def test_stop_tokens_cannot_be_chosen_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    early = params(temperature=0.0, min_tokens=2, stop_token_ids=(0,))
    assert sample(logits, [SampleRow(early, (), (1,))])[0].token_id == 1
    assert sample(logits, [SampleRow(early, (), (1, 1))])[0].token_id == 0


def test_logprobs_are_the_models_own_and_sorted() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    row = SampleRow(params(temperature=0.0, logprobs=3, logit_bias=((0, 50.0),)), (), ())
    chosen = sample(logits, [row])[0]
    assert chosen.token_id == 0
    assert chosen.logprobs is not None
    assert chosen.logprobs.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 0]))
    assert [token for token, _ in chosen.logprobs.top] == [1, 2, 0]


def test_zero_top_logprobs_give_the_chosen_token_alone() -> None:
    chosen = sample(torch.zeros(1, 4), [SampleRow(params(logprobs=0), (), ())])[0]
    assert chosen.logprobs is not None
    assert chosen.logprobs.top == ()
    assert chosen.logprobs.logprob == pytest.approx(-math.log(4))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_that_is_not_finite_is_marked_and_spares_other_rows(value: float, temperature: float) -> None:
    logits = torch.tensor([[0.0, value, 1.0], [0.0, 2.0, 1.0]])
    bad, good = sample(logits, [SampleRow(params(temperature=temperature), (), ())] * 2)
    assert bad.error is not None
    assert good.error is None


def test_sampling_leaves_the_logits_unchanged() -> None:
    logits = torch.randn(2, 20)
    before = logits.clone()
    rows = [SampleRow(params(repetition_penalty=2.0, logit_bias=((3, 9.0),), logprobs=2), (1,), (2, 2))] * 2
    sample(logits, rows)
    assert torch.equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_filters_agree_with_a_direct_computation(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 40))
    logits = torch.tensor(data.draw(st.lists(st.floats(-8, 8), min_size=size, max_size=size)))
    top_k = data.draw(st.integers(0, 50))
    top_p = data.draw(st.floats(0.05, 1.0))
    min_p = data.draw(st.floats(0.0, 0.9))
    probabilities = logits.double().softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = order[: top_k or size]
    mass = probabilities[kept] / probabilities[kept].sum()
    slack = 1e-5
    allowed = {
        int(token)
        for token, before, own in zip(kept, mass.cumsum(0) - mass, mass, strict=True)
        if before < top_p + slack and own >= min_p * mass[0] - slack
    }
    threshold = min(float(probabilities[token]) for token in allowed) - slack
    drawn = draw(logits, 20, top_k=top_k, top_p=top_p, min_p=min_p)
    assert all(float(probabilities[token]) >= threshold for token in drawn)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("top_k", -1),
        ("presence_penalty", 2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("max_tokens", -1),
        ("min_tokens", 11),
        ("logprobs", 21),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=field) as caught:
        params(**{field: value})
    assert caught.value.field == field
