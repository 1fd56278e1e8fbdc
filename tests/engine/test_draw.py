"""Draws on a CPU against a direct computation in float64 that sorts everything."""

from typing import Any

import numpy as np
import pytest
import torch

from rekindle.engine.draw import NOT_FINITE, Draw, choose_on_cpu
from support.logits import FILTERS, draw, logits, uniforms


def sorted_draw(logits_V: torch.Tensor, draw: Draw) -> int:
    values = logits_V.numpy()
    distance = values.max() - values
    order = np.arange(len(values)) if not draw.has_filters else np.argsort(distance, kind="stable")
    weight = np.exp(-distance[order].astype(np.float64) / draw.temperature)
    kept = min(draw.top_k or len(order), int(np.sum(weight >= draw.min_p))) if draw.has_filters else len(order)
    sums = weight[:kept].cumsum()
    sums = sums[: int(np.searchsorted(sums, draw.top_p * sums[-1])) + 1]
    return int(order[np.searchsorted(sums, draw.uniform * sums[-1], side="right")])


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 7, 300, 5003, 20000])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_equal_a_direct_computation(filters: dict[str, Any], vocabulary: int, rounded: bool) -> None:
    rows = logits(24, vocabulary, rounded=rounded)
    draws = [draw(uniform, **filters) for uniform in uniforms(24)]
    assert choose_on_cpu(rows, draws)() == [sorted_draw(row, draw) for row, draw in zip(rows, draws, strict=True)]


@pytest.mark.parametrize("filters", [{"top_k": 300}, {"top_p": 0.5}, {"top_k": 4000, "top_p": 0.75}])
def test_of_equal_tokens_the_lowest_ids_stay(filters: dict[str, Any]) -> None:
    num_kept = int(filters.get("top_k", 6000) * filters.get("top_p", 1.0))
    found = choose_on_cpu(torch.zeros(64, 6000), [draw(uniform, **filters) for uniform in uniforms(64)])()
    assert min(found) == 0
    assert max(found) == num_kept - 1


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 1e-9}])
def test_forbidden_tokens_are_never_drawn(filters: dict[str, Any]) -> None:
    rows = torch.full((64, 1000), -torch.inf)
    rows[:, 500] = 0.0
    assert set(choose_on_cpu(rows, [draw(uniform, **filters) for uniform in uniforms(64)])()) == {500}


def test_rows_that_are_not_finite_are_marked() -> None:
    rows = torch.zeros(5, 300)
    rows[0, 7], rows[1, 7], rows[2, :], rows[3, :7] = torch.nan, torch.inf, -torch.inf, -torch.inf
    assert choose_on_cpu(rows, [None] * 5)() == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 7, 0]
    assert choose_on_cpu(rows, [draw(0.0)] * 5)() == [NOT_FINITE, NOT_FINITE, NOT_FINITE, 7, 0]
