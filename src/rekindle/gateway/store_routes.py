"""What is where: models awake and asleep, and the host memory that lets them wake."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends

from rekindle.gateway.seams import ServedBase, load_estimates
from rekindle.gateway.state import GatewayState, state_of

router = APIRouter()
State = Annotated[GatewayState, Depends(state_of)]


@router.get("/v1/store")
async def store(state: State) -> dict[str, Any]:
    """Every model with the parts of its latest start in seconds and how long loads are likely to take, stage by stage;
    what host memory holds, in bytes; and how files are read: rates in bytes a second, null where they were not
    measured."""
    ask = state.services.host_memory
    return {
        "object": "store",
        "models": [_model(base) for base in state.services.bases],
        "host_memory": None if ask is None else msgspec.to_builtins(await ask()),
        "storage": msgspec.to_builtins(state.services.storage),
    }


def _model(base: ServedBase) -> dict[str, Any]:
    stats = base.replica.stats
    return {
        "id": base.name,
        "digest": base.manifest.digest,
        "is_awake": base.replica.ready is not None,
        "wakes_total": base.replica.wakes_total,
        "start_s": dict(base.replica.last_start_s),
        "estimates": msgspec.to_builtins(load_estimates(base.replica)),
        "resident_adapters": [] if stats is None else list(stats.resident_adapters),
    }
