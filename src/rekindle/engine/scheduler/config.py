"""The limits a scheduler keeps."""

from __future__ import annotations

from dataclasses import dataclass, fields

from rekindle.errors import ConfigurationError
from rekindle.protocol.identity import ModelDigest


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one replica, all at least 1.

    `num_pages` pages of `page_bytes` bytes hold either the keys and values of `page_tokens` tokens, `token_bytes`
    each, or adapter elements of `element_bytes` each. `max_step_tokens` bounds the positions of one step and is no
    smaller than `max_sequences`, the sequences running at once, so that every running sequence can decode in every
    step. `max_queued` bounds the sequences waiting; `max_context_tokens` bounds prompt and output together.
    """

    base: ModelDigest
    num_pages: int
    page_tokens: int
    page_bytes: int
    token_bytes: int
    element_bytes: int
    max_step_tokens: int
    max_sequences: int
    max_queued: int
    max_context_tokens: int

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.name != "base" and value < 1:
                raise ConfigurationError(f"{setting.name} must be at least 1, got {value}")
        if self.page_tokens * self.token_bytes > self.page_bytes:
            raise ConfigurationError(
                f"{self.page_tokens} tokens of {self.token_bytes} bytes do not fit into page_bytes = {self.page_bytes}"
            )
        if self.max_step_tokens < self.max_sequences:
            raise ConfigurationError(
                f"max_step_tokens = {self.max_step_tokens} is less than max_sequences = {self.max_sequences}: a step "
                "could not hold one token of every running sequence; raise the first or lower the second"
            )

    def pages_for_tokens(self, num_tokens: int) -> int:
        """Pages that hold the keys and values of `num_tokens` positions."""
        return -(-num_tokens // self.page_tokens)
