"""Liveness, readiness and metrics."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from rekindle.gateway.state import GatewayState, state_of

router = APIRouter()
State = Annotated[GatewayState, Depends(state_of)]


@router.get("/health")
async def health() -> dict[str, str]:
    """The process answers; says nothing of its engines."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(state: State) -> Response:
    """200 while every engine takes requests and the server is not shutting down, 503 otherwise."""
    engines = {base.name: base.replica.is_ready for base in state.services.bases}
    draining = state.services.lifecycle.draining
    if all(engines.values()) and not draining:
        return JSONResponse({"status": "ready", "models": engines})
    status = "draining" if draining else "starting"
    return JSONResponse({"status": status, "models": engines}, HTTPStatus.SERVICE_UNAVAILABLE, {"retry-after": "1"})


@router.get("/metrics")
async def metrics(state: State) -> Response:
    """All metrics in Prometheus' text format."""
    ask = state.services.host_memory
    text = state.metrics.render(None if ask is None else await ask())
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})
