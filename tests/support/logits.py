"""Rows of logits and draws for tests of sampling."""

import torch

from rekindle.engine.draw import Draw


def logits(rows: int, vocabulary: int, *, seed: int = 0, rounded: bool = False) -> torch.Tensor:
    """Rows as a language model gives them: a few likely tokens over a broad bulk; `rounded` to bfloat16, which makes
    many equal."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(rows, vocabulary, generator=generator) * 2
    likely = torch.randint(0, vocabulary, (rows, 20), generator=generator)
    logits_RV.scatter_add_(1, likely, torch.rand(rows, 20, generator=generator) * 12)
    return logits_RV.bfloat16().float() if rounded else logits_RV


def draw(uniform: float, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Draw:
    return Draw(temperature, top_k, top_p, min_p, uniform)


def uniforms(count: int, seed: int = 0) -> list[float]:
    """Numbers in [0, 1), with both its ends."""
    numbers = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    return [0.0, 1.0 - 2.0**-53, *numbers][:count]


FILTERS: list[dict[str, float]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 3000},
    {"top_k": 10**6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-9},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "min_p": 0.1, "top_p": 0.9},
    {"min_p": 1e-4, "top_p": 0.95},
    {"temperature": 4.0},
    {"temperature": 4.0, "top_p": 0.95},
    {"temperature": 100.0, "top_k": 2500, "top_p": 0.7},
    {"temperature": 0.01, "top_p": 0.9},
    {"temperature": 1e-5, "min_p": 0.5},
]
