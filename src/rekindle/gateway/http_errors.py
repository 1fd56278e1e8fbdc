"""The OpenAI error form: which status, type and headers each error becomes, in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus

import msgspec
from starlette.responses import Response

from rekindle.errors import (
    AdapterRejected,
    ConfigurationError,
    Conflict,
    DeadlineUnreachable,
    InternalError,
    InvalidRequest,
    ModelRejected,
    NotFound,
    Overloaded,
    RekindleError,
    ReplicaUnavailable,
    RequestError,
    RetryLater,
)


class BodyTooLarge(InvalidRequest):
    """The request's body passes the limit; it is answered before it is read."""


@dataclass(frozen=True, slots=True)
class _Form:
    """How one kind of error appears on the wire. `retry` goes out as `x-should-retry`, since OpenAI's clients would
    otherwise repeat conflicts and server errors that cannot change."""

    status: HTTPStatus
    type: str
    code: str | None
    retry: bool = False


_FORMS: tuple[tuple[type[RekindleError], _Form], ...] = (
    (BodyTooLarge, _Form(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "invalid_request_error", "request_too_large")),
    (NotFound, _Form(HTTPStatus.NOT_FOUND, "invalid_request_error", "not_found")),
    (Conflict, _Form(HTTPStatus.CONFLICT, "invalid_request_error", "conflict")),
    (AdapterRejected, _Form(HTTPStatus.BAD_REQUEST, "invalid_request_error", "adapter_rejected")),
    (ModelRejected, _Form(HTTPStatus.BAD_REQUEST, "invalid_request_error", "model_rejected")),
    (RequestError, _Form(HTTPStatus.BAD_REQUEST, "invalid_request_error", None)),
    (Overloaded, _Form(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "overloaded", retry=True)),
    (DeadlineUnreachable, _Form(HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "deadline_unreachable", retry=True)),
    (ReplicaUnavailable, _Form(HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "unavailable", retry=True)),
    (RetryLater, _Form(HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "unavailable", retry=True)),
    (ConfigurationError, _Form(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error", "configuration_error")),
    (InternalError, _Form(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error", "internal_error")),
    (RekindleError, _Form(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error", "internal_error")),
)
"""The first row whose class fits counts."""


def error_body(message: str, *, type_: str, field: str | None = None, code: str | None = None) -> bytes:
    """The JSON of OpenAI's error object; all four members are always there."""
    message = message.encode("utf-8", "backslashreplace").decode()  # what it quotes may hold lone surrogates
    return msgspec.json.encode({"error": {"message": message, "type": type_, "param": field, "code": code}})


def body_of(error: RekindleError) -> bytes:
    """The error object for `error`, as a response's body or an event of a stream that has already begun."""
    form = _form_of(error)
    field, code = (error.field, error.code) if isinstance(error, RequestError) else (None, None)
    return error_body(str(error), type_=form.type, field=field, code=code or form.code)


def response_of(error: RekindleError) -> Response:
    """The whole response for `error`, with advice on when to try again."""
    form = _form_of(error)
    headers = {"x-should-retry": "true" if form.retry else "false"}
    if isinstance(error, RetryLater):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    return Response(body_of(error), form.status, headers, media_type="application/json")


def response_of_status(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """The response for a fault that HTTP itself names: an unknown path, a method that is not allowed."""
    code = HTTPStatus(status).phrase.lower().replace(" ", "_")
    body = error_body(message, type_="invalid_request_error" if status < 500 else "server_error", code=code)
    return Response(body, status, headers, media_type="application/json")


def unexpected_response(request_id: str) -> Response:
    """The response for a fault nobody foresaw: it names the request and nothing of what is inside."""
    message = f"the server met an unexpected error; report it with the request id {request_id}"
    body = error_body(message, type_="server_error", code="internal_error")
    return Response(body, HTTPStatus.INTERNAL_SERVER_ERROR, media_type="application/json")


def _form_of(error: RekindleError) -> _Form:
    return next(form for kind, form in _FORMS if isinstance(error, kind))
