"""Request bodies: their fields and types. Ranges that the sampling record checks are not checked twice.

Types are strict, as in OpenAI's service: "5" is no number. Null means left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from rekindle.errors import InvalidRequest
from rekindle.gateway.fields import KnownFields, keep_supported

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_SALT_CHARS = 1024
MAX_PRIORITY = 1 << 31
MAX_SLO_MS = 86_400_000
SEED_MIN, SEED_MAX = -(1 << 63), (1 << 64) - 1


def _whole_number(value: object) -> object:
    """JSON has one kind of number: 5.0 is the integer 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stop_strings(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise _fault("must be a string that is not empty, or an array of such strings")
    if len(stops) > MAX_STOP_STRINGS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise _fault(f"may hold up to {MAX_STOP_STRINGS} strings of up to {MAX_STOP_CHARS} characters")
    return tuple(stops)


def _prompts(value: object) -> object:
    """One prompt or several, each as text or token ids, always as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _all_integers(value):
            return (tuple(value),)
        if all(isinstance(prompt, str) for prompt in value):
            return tuple(value)
        if all(isinstance(prompt, list) and _all_integers(prompt) for prompt in value):
            return tuple(tuple(prompt) for prompt in value)
    raise _fault(
        "must be a string, an array of strings, an array of token ids or an array of arrays of token ids; "
        "none may be empty arrays"
    )


def _all_integers(values: list[object]) -> bool:
    return bool(values) and all(type(value) is int for value in values)


def _fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("rekindle", "{message}", {"message": message})


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
TokenId = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, lt=1 << 31)]
Prompt = str | tuple[int, ...]


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Schema):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(_Schema):
    """Fields that chats and completions share."""

    model: str
    max_tokens: WholeNumber | None = None
    min_tokens: WholeNumber | None = None
    n: WholeNumber | None = None
    seed: Annotated[int, BeforeValidator(_whole_number), Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: WholeNumber | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop_strings)] = ()
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: WholeNumber | None = None
    priority: Annotated[int, BeforeValidator(_whole_number), Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    ttft_slo_ms: Annotated[float, Field(gt=0, le=MAX_SLO_MS)] | None = None
    cache_salt: Annotated[str, Field(max_length=MAX_SALT_CHARS)] | None = None


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: WholeNumber | None = None
    logprobs: bool | None = None
    top_logprobs: WholeNumber | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    best_of: WholeNumber | None = None
    echo: bool | None = None
    logprobs: WholeNumber | None = None


class AdapterBody(_Schema):
    """The body of POST /v1/adapters."""

    name: str
    source: str
    base_model: str | None = None


class TextPart(_Schema):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


Body = TypeVar("Body", bound=_Schema)


def parse_body(raw: bytes, schema: type[Body], known: KnownFields) -> Body:
    """Read a request's body.

    Raises:
        InvalidRequest: it is not JSON, not an object, or a field is unknown, unsupported, missing or of a wrong type.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the request's body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("the request's body is nested too deeply", code="invalid_json") from error
    if not isinstance(body, dict):
        raise InvalidRequest(f"the request's body must be a JSON object, got {_json_kind(body)}", code="invalid_json")
    try:
        return schema.model_validate(keep_supported(body, known, schema.model_fields))
    except ValidationError as error:
        raise first_fault(error) from error


_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "int_type": "an integer",
    "list_type": "an array",
    "model_type": "an object",
    "string_type": "a string",
}


def in_plain_words(kind: str, location: tuple[int | str, ...], value: object, text: str) -> InvalidRequest:
    """One fault found by pydantic (its type, place, input and message) in the words of this API."""
    field = field_path(location)
    match kind:
        case "missing":
            return InvalidRequest(f"Missing required parameter: `{field}`", field=field, code="missing_parameter")
        case "extra_forbidden":
            message = f"Unrecognized request argument supplied: {field}"
            return InvalidRequest(message, field=field, code="unknown_parameter")
        case "rekindle":
            return InvalidRequest(f"`{field}` {text}", field=field, code="invalid_value")
        case _ if kind in _EXPECTED:
            message = f"`{field}` must be {_EXPECTED[kind]}, got {_json_kind(value)}"
            return InvalidRequest(message, field=field, code="invalid_type")
    return InvalidRequest(f"`{field}` is out of range: {text.lower()}", field=field, code="invalid_value")


def first_fault(error: ValidationError, path: tuple[int | str, ...] = ()) -> InvalidRequest:
    """The first fault of a validation; `path` leads to what was validated."""
    fault = error.errors(include_url=False)[0]
    return in_plain_words(fault["type"], (*path, *fault["loc"]), fault["input"], fault["msg"])


def field_path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "role")` as `messages[0].role`."""
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return path.removeprefix(".")


_KINDS = {
    bool: "a boolean",
    dict: "an object",
    float: "a number",
    int: "an integer",
    list: "an array",
    str: "a string",
    type(None): "null",
}


def _json_kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)
