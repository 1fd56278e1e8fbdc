"""The choice of tokens on a GPU against that on a CPU."""

from typing import Any

import pytest
import torch

from rekindle.engine.draw import NOT_FINITE, choose_on_cpu
from rekindle.engine.kernels.gpu.sampling import choose_on_gpu
from rekindle.engine.sampling import SampleRow, sample
from rekindle.protocol.sampling import SamplingParams
from support.logits import FILTERS, draw, logits, uniforms

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # where a GPU says infinity, numpy warns


@pytest.mark.parametrize("vocabulary", [1, 50, 4096, 4097, 150_000])
def test_the_likeliest_token_is_found_wherever_it_is(device: torch.device, vocabulary: int) -> None:
    rows = logits(4, vocabulary)
    for row, place in enumerate((0, vocabulary // 2, vocabulary - 1)):
        rows[row, place] = 50.0
    found = choose_on_gpu(rows.to(device), [None] * 4)()
    assert found == [0, vocabulary // 2, vocabulary - 1, int(rows[3].argmax())]


def test_of_equally_likely_tokens_the_lowest_id_is_chosen(device: torch.device) -> None:
    rows = torch.full((3, 20_000), -5.0)
    rows[0, [19_999, 9_000, 17]] = 1.0
    rows[1, [3, 2]] = torch.tensor([0.0, -0.0])
    assert choose_on_gpu(rows.to(device), [None] * 3)() == [17, 2, 0]


@pytest.mark.parametrize("settings", [None, draw(0.0), draw(0.0, top_p=0.5)], ids=["greedy", "plain", "filtered"])
def test_rows_that_are_not_finite_are_marked(device: torch.device, settings: Any) -> None:
    rows = torch.zeros(6, 9000)
    rows[0, 7], rows[1, 7], rows[2, :], rows[3, :7] = torch.nan, torch.inf, -torch.inf, -torch.inf
    rows[5] = -torch.finfo(torch.float32).max
    expected = [NOT_FINITE, NOT_FINITE, NOT_FINITE, 7, 0, 0]
    assert choose_on_gpu(rows.to(device), [settings] * 6)() == expected


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 300, 4999])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_equal_those_on_a_cpu(
    device: torch.device, filters: dict[str, Any], vocabulary: int, rounded: bool
) -> None:
    rows = logits(3, vocabulary, rounded=rounded)
    draws = [draw(uniform, **filters) for uniform in uniforms(3)]
    assert choose_on_gpu(rows.to(device), draws)() == choose_on_cpu(rows, draws)()


@pytest.mark.parametrize("filters", [{"top_k": 300}, {"top_p": 0.5}, {"top_k": 4000, "top_p": 0.75}, {"min_p": 0.5}])
def test_of_equal_tokens_the_lowest_ids_stay(device: torch.device, filters: dict[str, Any]) -> None:
    draws = [draw(uniform, **filters) for uniform in uniforms(6)]
    rows = torch.zeros(6, 10_000)
    assert choose_on_gpu(rows.to(device), draws)() == choose_on_cpu(rows, draws)()


def test_rows_that_are_drawn_and_rows_that_are_not_share_a_batch(device: torch.device) -> None:
    rows = logits(6, 4000)
    draws = [None, draw(0.3), draw(0.6, top_p=0.9), None, draw(0.9, top_k=5), draw(0.1, min_p=0.2)]
    assert choose_on_gpu(rows.to(device), draws)() == choose_on_cpu(rows, draws)()


@pytest.mark.parametrize("settings", [None, draw(0.7, top_p=0.9)], ids=["greedy", "filtered"])
def test_rows_may_lie_apart(device: torch.device, settings: Any) -> None:
    wide = logits(4, 5000).to(device)
    found = choose_on_gpu(wide[:, 100:4100], [settings] * 4)()
    assert found == choose_on_cpu(wide[:, 100:4100].cpu().contiguous(), [settings] * 4)()


def test_sampling_is_the_same_on_both_devices(device: torch.device) -> None:
    """Penalties, biases, forbidden stops, log-probabilities and errors, in one batch."""
    changes: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": ((3, 9.0), (17, -100.0)), "logprobs": 2},
        {"repetition_penalty": 1.3, "top_p": 0.9, "logprobs": 0},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4, "top_k": 20},
        {"min_tokens": 9, "stop_token_ids": (5, 8, 10**6), "min_p": 0.1, "logprobs": 5},
        {"min_tokens": 9, "stop_token_ids": tuple(range(1000))},
        {},
    ]
    params = [SamplingParams(**{"max_tokens": 10, "seed": seed, **c}) for seed, c in enumerate(changes)]  # type: ignore[arg-type]
    rows = [SampleRow(each, (1, 2, 3, 3), (5, 5, 8)) for each in params]
    logits_RV = logits(len(rows), 1000)
    logits_RV[6, 10] = torch.nan
    ours, theirs = sample(logits_RV.to(device), rows, choose_on_gpu), sample(logits_RV, rows)
    assert [(chosen.token_id, chosen.error) for chosen in ours] == [(each.token_id, each.error) for each in theirs]
    assert [chosen.error is None for chosen in ours] == [True] * 5 + [False] * 2
    for our, their in zip(ours, theirs, strict=True):
        assert (our.logprobs is None) == (their.logprobs is None)
        if our.logprobs and their.logprobs:
            assert our.logprobs.logprob == pytest.approx(their.logprobs.logprob, abs=1e-5)
            assert [token for token, _ in our.logprobs.top] == [token for token, _ in their.logprobs.top]
