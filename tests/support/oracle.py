"""What transformers says, computed without any cache: the oracle of the engine's tests."""

from __future__ import annotations

from typing import Any

import torch

from support.tiny import VOCABULARY

PROMPT_LENGTHS = (1, 5, 37, 100)


def random_prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def oracle_greedy(model: Any, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def oracle_prompt_logprobs(model: Any, prompt: list[int]) -> list[float]:
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(prompt[1:])]
