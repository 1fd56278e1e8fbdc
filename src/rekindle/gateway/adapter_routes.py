"""Adapters at run time: register, replace, look at, remove."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from rekindle.gateway.documentation import body_schema
from rekindle.gateway.fields import ADAPTER_FIELDS
from rekindle.gateway.schemas import AdapterBody
from rekindle.gateway.seams import RegisteredAdapter
from rekindle.gateway.state import GatewayState, state_of
from rekindle.store.safetensors_file import DTYPE_BYTES

router = APIRouter(prefix="/v1/adapters")
State = Annotated[GatewayState, Depends(state_of)]
MAX_PAGE_ADAPTERS = 1000


@router.post("", openapi_extra=body_schema(AdapterBody))
async def register_adapter(request: Request, state: State) -> Response:
    """Register an adapter, or a new version of one: 201 for a new name, 200 otherwise. The work is finished even if
    the client leaves."""
    body = await state.read_body(request, AdapterBody, ADAPTER_FIELDS)
    with state.services.lifecycle.work(state.services.settings.retry_after_s):
        registered = await state.adapters.register(body)
    status = HTTPStatus.CREATED if registered.is_new else HTTPStatus.OK
    return JSONResponse(_adapter_object(state, registered.adapter), status)


@router.get("")
async def list_adapters(
    state: State,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE_ADAPTERS)] = 100,
    after: str | None = None,
) -> dict[str, Any]:
    """Adapters by name, `limit` at a time, beginning after the name `after`."""
    adapters = await state.adapters.page(after, limit + 1)
    data = [_adapter_object(state, adapter) for adapter in adapters[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(adapters) > limit,
    }


@router.get("/{name:path}")
async def retrieve_adapter(name: str, state: State) -> dict[str, Any]:
    """One adapter as it is registered now."""
    return _adapter_object(state, await state.adapters.get(name))


@router.delete("/{name:path}")
async def delete_adapter(name: str, state: State) -> dict[str, Any]:
    """Remove an adapter. Requests in flight finish on it."""
    await state.adapters.remove(name)
    return {"id": name, "object": "adapter", "deleted": True}


def _adapter_object(state: GatewayState, adapter: RegisteredAdapter) -> dict[str, Any]:
    manifest = adapter.manifest
    stats = state.adapters.base_of(adapter).replica.stats
    on_device = stats is not None and manifest.digest in stats.resident_adapters
    return {
        "id": adapter.name,
        "object": "adapter",
        "name": adapter.name,
        "base_model": adapter.base_name,
        "version": manifest.digest,
        "created": adapter.created_s,
        "ranks": list(manifest.ranks),
        "targets": list(manifest.targets),
        "dtype": manifest.dtype,
        "bytes": manifest.num_elements * DTYPE_BYTES[manifest.dtype],
        "bound_tensors": 2 * len(manifest.bindings) + len(manifest.replaced),
        "residency": "device" if on_device else "disk",
        "running_requests": state.runner.versions.num_leases(manifest.digest),
    }
