"""Refusal of requests that could never be carried out here, with the numbers."""

from __future__ import annotations

from rekindle.engine.scheduler.config import SchedulerConfig
from rekindle.engine.scheduler.sequence import Sequence
from rekindle.errors import InvalidRequest
from rekindle.protocol.generation import GenerateRequest


def check_prompt(request: GenerateRequest, config: SchedulerConfig) -> None:
    """Raise InvalidRequest if the prompt is empty or leaves no room for a token."""
    num_tokens = len(request.prompt_token_ids)
    if num_tokens == 0:
        raise InvalidRequest("the prompt has no tokens; it needs at least one", field="prompt")
    if num_tokens >= config.max_context_tokens:
        raise InvalidRequest(
            f"the prompt has {num_tokens} tokens, but at most {config.max_context_tokens - 1} fit into the context of "
            f"{config.max_context_tokens} tokens beside one token of output; shorten it",
            field="prompt",
            code="context_length_exceeded",
        )


def check_fits(sequence: Sequence, num_adapter_pages: int, config: SchedulerConfig) -> None:
    """Raise InvalidRequest if the sequence at its full length and its adapter do not fit into an empty pool."""
    num_kv_pages = config.pages_for_tokens(sequence.max_positions)
    if num_kv_pages + num_adapter_pages <= config.num_pages:
        return
    num_prompt_pages = config.pages_for_tokens(sequence.num_prompt)
    prompt_fits = num_prompt_pages + num_adapter_pages <= config.num_pages
    adapter_part = f" and {num_adapter_pages} for its adapter" if num_adapter_pages else ""
    raise InvalidRequest(
        f"the request takes {num_kv_pages} pages for {sequence.num_prompt} prompt tokens and up to "
        f"{sequence.end_tokens - sequence.num_prompt} tokens of output{adapter_part}, but the pool has "
        f"{config.num_pages} pages of {config.page_tokens} tokens; "
        f"{'lower max_tokens' if prompt_fits else 'shorten the prompt'} or raise the engine's memory budget",
        field="max_tokens" if prompt_fits else "prompt",
        code="request_too_large",
    )
