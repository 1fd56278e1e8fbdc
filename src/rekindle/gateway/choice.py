"""One sequence on its way out: tokens in, text and log-probabilities out. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.errors import EngineFailed, StreamBroken
from rekindle.gateway.stop_strings import StopStrings
from rekindle.gateway.text import Detokenizer, Tokenizer
from rekindle.protocol.generation import FinishReason, TokenChunk, TokenLogprobs


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How a sequence's tokens become text. Stop strings count once `min_tokens` tokens have come."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one or more chunks added to a choice. `tokens` and `text_offsets`, the characters before each token, are
    empty unless log-probabilities were asked for. The last delta of a choice has a `finish_reason`."""

    index: int
    text: str
    tokens: tuple[TokenLogprobs, ...] = ()
    text_offsets: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None

    def followed_by(self, later: Delta) -> Delta:
        """Both as one; `later` is of the same choice."""
        return Delta(
            self.index,
            self.text + later.text,
            self.tokens + later.tokens,
            self.text_offsets + later.text_offsets,
            later.finish_reason,
        )


class Choice:
    """The state of one choice. `feed` it the chunks in order until `finished`."""

    def __init__(self, index: int, tokenizer: Tokenizer, options: OutputOptions) -> None:
        self.index = index
        self.num_tokens = 0
        self.cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self.finished = False
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stops, include=options.include_stop) if options.stops else None
        self._show_stop_token = options.include_stop
        self._min_tokens = options.min_tokens
        self._num_chars = 0

    def feed(self, chunk: TokenChunk) -> Delta | None:
        """What this chunk adds; None when it adds nothing yet.

        Raises:
            EngineFailed: the engine gave the sequence up.
            StreamBroken: tokens before this chunk are missing, or it repeats some.
        """
        self._note_first(chunk)
        finish = chunk.finish_reason
        if finish in (FinishReason.ERROR, FinishReason.ABORT):
            raise EngineFailed(chunk.error or "the engine gave the request up")
        num_shown = len(chunk.token_ids)
        if finish is FinishReason.STOP and num_shown and not self._show_stop_token:
            num_shown -= 1
        text, offsets, stopped = self._read(chunk.token_ids[:num_shown])
        if stopped:
            finish = FinishReason.STOP
        else:
            self.num_tokens = chunk.offset + len(chunk.token_ids)
            if finish is not None:
                text += self._flush()
        self.finished = finish is not None
        tokens = chunk.logprobs[: len(offsets)] if chunk.logprobs else ()
        if not (text or tokens or self.finished):
            return None
        return Delta(self.index, text, tokens, offsets if tokens else (), finish)

    def _note_first(self, chunk: TokenChunk) -> None:
        if chunk.offset != self.num_tokens:
            raise StreamBroken(f"{chunk.request_id}: expected tokens from {self.num_tokens} on, got {chunk.offset}")
        if chunk.cached_tokens is not None:
            self.cached_tokens = chunk.cached_tokens
        if chunk.prompt_logprobs is not None:
            self.prompt_logprobs = chunk.prompt_logprobs

    def _read(self, token_ids: Sequence[int]) -> tuple[str, tuple[int, ...], bool]:
        """Text that may be shown, the characters before each token read, and whether a stop string ended it."""
        shown: list[str] = []
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(self._num_chars)
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            self._num_chars += len(text)
            if self._stops is None or self.num_tokens <= self._min_tokens:
                shown.append(text)
                continue
            matched = self._stops.push(text)
            shown.append(matched.text)
            if matched.stopped:
                return "".join(shown), tuple(offsets), True
        return "".join(shown), tuple(offsets), False

    def _flush(self) -> str:
        tail = self._detokenizer.flush()
        if self._stops is None:
            return tail
        matched = self._stops.push(tail)
        return matched.text if matched.stopped else matched.text + self._stops.flush()
