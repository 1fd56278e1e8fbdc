"""What happens around every request, as one plain ASGI layer: its id, the size of its body, faults nobody foresaw."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rekindle.gateway.http_errors import BodyTooLarge, response_of, unexpected_response
from rekindle.units import format_bytes

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "x-request-id"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
DISCARD_FACTOR = 8
"""A body up to this many times the limit is read and thrown away, since most clients read no answer before they have
written their request; beyond it the connection is closed on them."""


class RequestEnvelope:
    """Gives every response an `x-request-id` (the client's own where it is sane), refuses bodies that are too large,
    and answers an unforeseen exception with 500 after logging it. It must not die, so it alone catches everything."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        body = _LimitedBody(receive, self._max_body_bytes)
        try:
            if body.announced_too_large(Headers(scope=scope)):
                await body.refuse(scope, send_with_id)
            else:
                await self._app(scope, body.receive, send_with_id)
        except ClientDisconnect:
            return  # while it was sending its body: nobody is left to answer
        except Exception:
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:
                raise
            await unexpected_response(request_id)(scope, receive, send_with_id)


class _LimitedBody:
    """Counts a request's body as it is read and raises `BodyTooLarge` past the limit."""

    def __init__(self, receive: Receive, max_body_bytes: int) -> None:
        self._receive = receive
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0
        self._complete = False

    def announced_too_large(self, headers: Headers) -> bool:
        announced = headers.get("content-length", "")
        return announced.isdigit() and int(announced) > self._max_body_bytes

    async def refuse(self, scope: Scope, send: Send) -> None:
        await self._discard()
        await response_of(self._too_large())(scope, self._receive, send)

    async def receive(self) -> Message:
        message = await self._read()
        if self._num_bytes > self._max_body_bytes:
            await self._discard()
            raise self._too_large()
        return message

    async def _discard(self) -> None:
        """Read what is left, within reason."""
        while not self._complete and self._num_bytes <= DISCARD_FACTOR * self._max_body_bytes:
            await self._read()

    async def _read(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request's body is larger than the limit of {format_bytes(self._max_body_bytes)}")


def _request_id(headers: Headers) -> str:
    offered = headers.get(REQUEST_ID_HEADER, "")
    return offered if _SANE_REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
