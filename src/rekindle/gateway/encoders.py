"""OpenAI's reply forms, written as JSON by hand where it is done once per token.

What a reply repeats in every event (id, model, time, fingerprint) is encoded once; an event then costs one string
escape and one join.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from rekindle.gateway.choice import Delta
from rekindle.gateway.text import Detokenizer, Tokenizer
from rekindle.protocol.generation import FinishReason, TokenLogprobs

LEAST_LOGPROB = -9999.0
"""What OpenAI reports for a token of no probability; JSON has no infinity."""

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Heading:
    """What every reply and event of one request begins with."""

    id: str
    created_s: int
    model: str
    fingerprint: str

    def encode(self, kind: str) -> bytes:
        members = {
            "id": self.id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }
        return _encode(members)[:-1]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens a request used. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def encode(self) -> bytes:
        return _encode({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        })  # fmt: skip


PromptLogprobs = tuple[TokenLogprobs | None, ...]


@dataclass(slots=True)
class Outcome:
    """A whole choice, for replies that are not streamed."""

    index: int
    text: list[str] = field(default_factory=list)
    tokens: list[TokenLogprobs] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prompt_logprobs: PromptLogprobs | None = None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.text_offsets.extend(delta.text_offsets)
        self.finish_reason = delta.finish_reason


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """Which optional parts a reply has."""

    with_logprobs: bool
    with_prompt_logprobs: bool
    include_usage: bool


class ReplyEncoder(Protocol):
    """One request's reply in one of OpenAI's forms, streamed or whole."""

    def opening(self, num_choices: int) -> bytes:
        """Events before any text."""
        ...

    def event(self, delta: Delta, prompt_logprobs: PromptLogprobs | None) -> bytes:
        """Events for a delta; `prompt_logprobs` comes with a choice's first."""
        ...

    def usage_event(self, usage: Usage) -> bytes: ...

    def whole(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes: ...


class _EventFrame:
    """The parts of an event around its choices. Where usage was asked for, every event has the member."""

    def __init__(self, heading: Heading, kind: str, *, include_usage: bool) -> None:
        self._start = b"data: " + heading.encode(kind) + b',"choices":['
        self._end = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def event(self, choice: bytes) -> bytes:
        return self._start + choice + self._end

    def usage_event(self, usage: Usage) -> bytes:
        return self._start + b'],"usage":' + usage.encode() + b"}\n\n"


class ChatEncoder:
    """chat.completion and chat.completion.chunk."""

    def __init__(self, heading: Heading, tokenizer: Tokenizer, form: ReplyForm) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._form = form
        self._frame = _EventFrame(heading, "chat.completion.chunk", include_usage=form.include_usage)

    def opening(self, num_choices: int) -> bytes:
        delta = b'{"role":"assistant","content":"","refusal":null}'
        return b"".join(self._choice(index, delta, b"null", b"null") for index in range(num_choices))

    def event(self, delta: Delta, prompt_logprobs: PromptLogprobs | None) -> bytes:
        parts = []
        if delta.text or delta.tokens:
            content = b'{"content":' + _encode(delta.text) + b"}"
            parts.append(self._choice(delta.index, content, self._logprobs(delta.tokens), b"null"))
        if delta.finish_reason is not None:
            parts.append(self._choice(delta.index, b"{}", b"null", _encode(delta.finish_reason.value)))
        return b"".join(parts)

    def usage_event(self, usage: Usage) -> bytes:
        return self._frame.usage_event(usage)

    def whole(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        choices = [
            b'{"index":%d,"message":{"role":"assistant","content":%b,"refusal":null},"logprobs":%b,"finish_reason":%b}'
            % (
                outcome.index,
                _encode("".join(outcome.text)),
                self._logprobs(outcome.tokens),
                _encode(outcome.finish_reason),
            )
            for outcome in outcomes
        ]
        extra = _prompt_logprobs_member(outcomes[0], self._form, self._tokenizer)
        start = self._heading.encode("chat.completion")
        return start + b',"choices":[' + b",".join(choices) + b'],"usage":' + usage.encode() + extra + b"}"

    def _choice(self, index: int, delta: bytes, logprobs: bytes, finish_reason: bytes) -> bytes:
        return self._frame.event(
            b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}' % (index, delta, logprobs, finish_reason)
        )

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> bytes:
        if not self._form.with_logprobs:
            return b"null"
        content = [
            {**self._entry(t.token_id, t.logprob), "top_logprobs": [self._entry(i, logprob) for i, logprob in t.top]}
            for t in tokens
        ]
        return _encode({"content": content, "refusal": None})

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt to be repeated before its completion."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _TokenLists:
    """The parallel lists of a completion's `logprobs`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def followed_by(self, later: _TokenLists) -> _TokenLists:
        return _TokenLists(
            self.tokens + later.tokens,
            self.token_logprobs + later.token_logprobs,
            self.top_logprobs + later.top_logprobs,
            self.text_offset + later.text_offset,
        )

    def encode(self) -> bytes:
        return _encode(self)


class CompletionEncoder:
    """text_completion, streamed or whole. `echoes` holds one entry per prompt, or nothing; a prompt has
    `choices_per_prompt` choices, which follow one another and share what is said of the prompt: it is encoded once."""

    def __init__(
        self,
        heading: Heading,
        tokenizer: Tokenizer,
        form: ReplyForm,
        *,
        choices_per_prompt: int,
        echoes: Sequence[Echo] = (),
    ) -> None:
        self._heading = heading
        self._tokenizer = tokenizer
        self._form = form
        self._choices_per_prompt = choices_per_prompt
        self._echoes = echoes
        self._frame = _EventFrame(heading, "text_completion", include_usage=form.include_usage)
        self._opened: set[int] = set()
        self._prompt_lists: dict[int, _TokenLists] = {}
        self._prompt_logprobs: dict[int, bytes] = {}

    def opening(self, num_choices: int) -> bytes:
        return b""

    def usage_event(self, usage: Usage) -> bytes:
        return self._frame.usage_event(usage)

    def event(self, delta: Delta, prompt_logprobs: PromptLogprobs | None) -> bytes:
        outcome = Outcome(delta.index)
        outcome.add(delta)
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            outcome.prompt_logprobs = prompt_logprobs
            return self._frame.event(self._choice(outcome, echo=self._echo_of(delta.index)))
        return self._frame.event(self._choice(outcome, echo=None))

    def whole(self, outcomes: Sequence[Outcome], usage: Usage) -> bytes:
        choices = [self._choice(outcome, echo=self._echo_of(outcome.index)) for outcome in outcomes]
        start = self._heading.encode("text_completion")
        return start + b',"choices":[' + b",".join(choices) + b'],"usage":' + usage.encode() + b"}"

    def _prompt_of(self, index: int) -> int:
        return index // self._choices_per_prompt

    def _echo_of(self, index: int) -> Echo | None:
        return self._echoes[self._prompt_of(index)] if self._echoes else None

    def _choice(self, outcome: Outcome, *, echo: Echo | None) -> bytes:
        text = "".join(outcome.text)
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}' % (
            outcome.index,
            _encode(text if echo is None else echo.text + text),
            self._logprobs(outcome, echo) if self._form.with_logprobs else b"null",
            _encode(outcome.finish_reason),
            self._prompt_logprobs_member(outcome),
        )

    def _prompt_logprobs_member(self, outcome: Outcome) -> bytes:
        prompt = self._prompt_of(outcome.index)
        if prompt not in self._prompt_logprobs:
            self._prompt_logprobs[prompt] = _prompt_logprobs_member(outcome, self._form, self._tokenizer)
        return self._prompt_logprobs[prompt]

    def _logprobs(self, outcome: Outcome, echo: Echo | None) -> bytes:
        """The four parallel lists. Offsets count characters of the choice's own text, an echoed prompt included."""
        prompt = self._echo_of(outcome.index)
        num_echoed_chars = 0 if prompt is None else len(prompt.text)
        token_ids = [token.token_id for token in outcome.tokens]
        offsets = [num_echoed_chars + offset for offset in outcome.text_offsets]
        lists = self._lists(token_ids, outcome.tokens, offsets)
        return (lists if echo is None else self._lists_of_prompt(outcome, echo).followed_by(lists)).encode()

    def _lists_of_prompt(self, outcome: Outcome, echo: Echo) -> _TokenLists:
        prompt = self._prompt_of(outcome.index)
        if prompt not in self._prompt_lists:
            entries = outcome.prompt_logprobs or (None,) * len(echo.token_ids)
            self._prompt_lists[prompt] = self._lists(echo.token_ids, entries, self._offsets_in(echo))
        return self._prompt_lists[prompt]

    def _lists(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], offsets: list[int]
    ) -> _TokenLists:
        return _TokenLists(
            tokens=[self._name(token_id) for token_id in token_ids],
            token_logprobs=[None if entry is None else _finite(entry.logprob) for entry in entries],
            top_logprobs=[None if entry is None else self._top(entry) for entry in entries],
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The alternatives and the token itself, which may be one of them."""
        pairs = (*entry.top, (entry.token_id, entry.logprob))
        return {self._name(token_id): _finite(logprob) for token_id, logprob in pairs}

    def _name(self, token_id: int) -> str:
        """A token's text; the bytes of a part of a character are spelled out, so that tokens stay apart."""
        raw = self._tokenizer.token_bytes(token_id)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{value:02x}" for value in raw)

    def _offsets_in(self, echo: Echo) -> list[int]:
        """Special tokens count where the text spells them out, and not where the tokenizer added them."""
        tokenizer, text = self._tokenizer, echo.text
        decoder = Detokenizer(tokenizer, skip_special_tokens=False)
        num_chars, offsets = 0, []
        for token_id in echo.token_ids:
            offsets.append(min(num_chars, len(text)))
            is_special = token_id in tokenizer.special_ids
            if not is_special or text.startswith(tokenizer.token_text(token_id), num_chars):
                num_chars += len(decoder.push((token_id,)))
        return offsets


def _prompt_logprobs_member(outcome: Outcome, form: ReplyForm, tokenizer: Tokenizer) -> bytes:
    """vLLM's `prompt_logprobs`: for each prompt token None or {id: {logprob, rank, decoded_token}}."""
    if not form.with_prompt_logprobs or outcome.prompt_logprobs is None:
        return b""
    entries = [None if entry is None else _ranked(entry, tokenizer) for entry in outcome.prompt_logprobs]
    return b',"prompt_logprobs":' + _encode(entries)


def _ranked(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The rank of the token itself is known only where it is among the alternatives."""
    ranks = {token_id: place for place, (token_id, _) in enumerate(entry.top, start=1)}
    pairs = {**dict(entry.top), entry.token_id: entry.logprob}
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": ranks.get(token_id),
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, logprob in pairs.items()
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
