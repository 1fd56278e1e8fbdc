"""Chat messages as templates want them: known roles, content as one string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from rekindle.errors import InvalidRequest
from rekindle.gateway.chat_template import Message
from rekindle.gateway.schemas import TextPart, first_fault

ROLES = ("developer", "system", "user", "assistant", "tool")


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages with their parts joined; other members (`name`, `tool_call_id`, ...) are kept for the template.

    Raises:
        InvalidRequest: there is no message, or a role or a content is not one of a chat.
    """
    if not messages:
        raise InvalidRequest("`messages` must hold at least one message", field="messages", code="empty_array")
    return [_plain_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _plain_message(message: dict[str, Any], path: str) -> Message:
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(
            f"`{path}.role` must be one of {', '.join(ROLES)}, got {role!r:.80}",
            field=f"{path}.role",
            code="invalid_value",
        )
    content = message.get("content")
    if content is None:
        if role == "assistant" and message.get("tool_calls"):
            return {**message, "content": ""}
        raise InvalidRequest(f"Missing required parameter: `{path}.content`", field=f"{path}.content")
    if isinstance(content, str):
        return message
    if isinstance(content, list):
        return {**message, "content": "".join(_text_of(part, f"{path}.content[{i}]") for i, part in enumerate(content))}
    raise InvalidRequest(
        f"`{path}.content` must be a string or an array of text parts", field=f"{path}.content", code="invalid_type"
    )


def _text_of(part: object, path: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise InvalidRequest(
            f"`{path}`: parts of type {kind[:40]!r} are not supported; this model reads text only",
            field=path,
            code="unsupported_content",
        )
    try:
        return TextPart.model_validate(part).text
    except ValidationError as error:
        raise first_fault(error, (path,)) from error
