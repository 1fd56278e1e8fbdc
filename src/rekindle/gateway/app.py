"""The web application: routes, error forms and the layer around every request."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rekindle.errors import RekindleError
from rekindle.gateway import adapter_routes, health_routes, openai_routes, store_routes
from rekindle.gateway.http_errors import response_of, response_of_status
from rekindle.gateway.middleware import RequestEnvelope
from rekindle.gateway.schemas import in_plain_words
from rekindle.gateway.seams import Services
from rekindle.gateway.state import GatewayState
from rekindle.version import VERSION


def create_app(services: Services) -> FastAPI:
    """An application over these services; it starts and stops none of them.

    Raises:
        ConfigurationError: the tokenizer, chat template or settings of a base cannot be used.
    """
    kinds = (RekindleError, RequestValidationError, HTTPException)
    app = FastAPI(title="Rekindle", version=VERSION, exception_handlers=dict.fromkeys(kinds, _answer_error))
    app.state.gateway = GatewayState(services)
    app.include_router(openai_routes.router)
    app.include_router(adapter_routes.router)
    app.include_router(store_routes.router)
    app.include_router(health_routes.router)
    app.add_middleware(RequestEnvelope, max_body_bytes=services.settings.max_body_bytes)
    return app


async def _answer_error(request: Request, error: Exception) -> Response:
    match error:
        case RekindleError():
            return response_of(error)
        case RequestValidationError():
            fault = error.errors()[0]
            return response_of(in_plain_words(fault["type"], fault["loc"][1:], fault["input"], fault["msg"]))
        case HTTPException():
            message = _status_message(request, error)
            return response_of_status(error.status_code, message, dict(error.headers or {}))
    raise error


def _status_message(request: Request, error: HTTPException) -> str:
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return f"Unknown request URL: {request.method} {request.url.path}. Check the path for typing errors."
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return f"Not allowed to {request.method} on {request.url.path}"
        case _:
            return error.detail
