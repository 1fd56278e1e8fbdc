"""Chat templates: from messages to the text a model was tuned on.

Templates come with models and adapters, so they are other people's code: they run in a sandbox of limited means with
the helpers Hugging Face templates rely on, and a fault in one is a fault of the request, never of the server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from rekindle.clock import Clock
from rekindle.errors import InvalidRequest
from rekindle.gateway.template_sandbox import BoundedEnvironment

FINAL_MESSAGE_END = "\ue000rekindle-final-message-end\ue000"
"""Marks the end of a message that is to be continued; private-use characters, so no prompt contains it by accident."""

MAX_TEMPLATE_CHARS = 1 << 16
"""Python compiles a template of this size in a fraction of a second, during which no other thread runs; the largest
in use have a third of it."""
MAX_FAULT_CHARS = 300
MAX_TIME_FORMAT_CHARS = 256

Message = Mapping[str, Any]


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A compiled template of one model or adapter version. Whoever renders it in a thread holds `turn`: Python runs one
    render at a time anyway, and a template that is slow then keeps one thread busy and not all."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], clock: Clock) -> None:
        """Compile `source`.

        Raises:
            InvalidRequest: the template is not valid Jinja.
        """
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source
        self.turn = asyncio.Lock()
        self._environment = _environment(clock)
        if len(source) > MAX_TEMPLATE_CHARS:
            raise _invalid(f"it has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}")
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # Jinja and Python's compiler refuse foreign code in many ways
            raise _invalid(_fault(error)) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`. With `continue_final_message` it ends inside the last message.

        `extra` holds further template variables; it cannot replace the messages or the special tokens.

        Raises:
            InvalidRequest: the template refuses the messages, or cannot be continued.
        """
        turns = [self._known_role(message) for message in messages]
        if continue_final_message:
            turns[-1] = {**turns[-1], "content": f"{turns[-1].get('content') or ''}{FINAL_MESSAGE_END}"}
        variables = {
            **(extra or {}),
            **self._special_tokens,
            "messages": turns,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._environment.limited():
                text = self._template.render(variables)
        except Exception as error:  # foreign code: whatever it raises is a fault of the request
            raise InvalidRequest(
                f"the model's chat template refused the messages: {_fault(error)}", field="messages"
            ) from error
        return _cut_at_final_message(text) if continue_final_message else text

    def _known_role(self, message: Message) -> dict[str, Any]:
        """Most templates predate the developer role, which means what system meant."""
        if message.get("role") == "developer" and not self._knows_developer:
            return {**message, "role": "system"}
        return dict(message)


def read_template_source(directory: Path) -> str | None:
    """The chat template stored with a model or an adapter; None where it has none."""
    try:
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _cut_at_final_message(text: str) -> str:
    end = text.rfind(FINAL_MESSAGE_END)
    if end < 0:
        raise InvalidRequest(
            "continue_final_message: the model's chat template does not show the last message as it was given; "
            "leave continue_final_message out",
            field="continue_final_message",
        )
    return text[:end]


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the model's chat template is not valid: {reason}", field="messages")


def _fault(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError):
        return str(error)[:MAX_FAULT_CHARS]
    return f"{type(error).__name__}: {error!s:.{MAX_FAULT_CHARS}}"


def _environment(clock: Clock) -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, LoopControlExtension]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now(clock)
    return environment


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(message if isinstance(message, str) else f"a {type(message).__name__}")


def _strftime_now(clock: Clock) -> Callable[[str], str]:
    def strftime_now(form: str) -> str:
        if len(form) > MAX_TIME_FORMAT_CHARS:
            raise jinja2.TemplateError(f"a time format may have {MAX_TIME_FORMAT_CHARS} characters, got {len(form)}")
        return datetime.fromtimestamp(clock.unix_s(), tz=UTC).strftime(form)

    return strftime_now
