"""OpenAI's routes: chat completions, completions, models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from rekindle.gateway.documentation import body_schema
from rekindle.gateway.fields import CHAT_FIELDS, COMPLETION_FIELDS
from rekindle.gateway.reply import GenerationReply
from rekindle.gateway.schemas import ChatBody, CompletionBody
from rekindle.gateway.served_model import ServedModel
from rekindle.gateway.state import GatewayState, state_of

router = APIRouter(prefix="/v1")
State = Annotated[GatewayState, Depends(state_of)]
OWNER = "rekindle"


@router.post("/chat/completions", openapi_extra=body_schema(ChatBody))
async def create_chat_completion(request: Request, state: State) -> Response:
    """Answer a conversation, whole or as a stream of events."""
    body = await state.read_body(request, ChatBody, CHAT_FIELDS)
    target = await state.resolve(body.model)
    return GenerationReply(await state.jobs.chat(body, target), state.runner)


@router.post("/completions", openapi_extra=body_schema(CompletionBody))
async def create_completion(request: Request, state: State) -> Response:
    """Continue one or more prompts, whole or as a stream of events."""
    body = await state.read_body(request, CompletionBody, COMPLETION_FIELDS)
    target = await state.resolve(body.model)
    return GenerationReply(await state.jobs.completion(body, target), state.runner)


@router.get("/models")
async def list_models(state: State) -> dict[str, Any]:
    """The base models served here and their adapters."""
    adapters = await state.adapters.names()
    bases = [{**_base_object(model), "id": name} for model in state.models.values() for name in model.base.names]
    return {
        "object": "list",
        "data": [*bases, *(_adapter_object(state.models[it.base], it.name, it.created_s) for it in adapters)],
    }


@router.get("/models/{name:path}")
async def retrieve_model(name: str, state: State) -> dict[str, Any]:
    """One base model or adapter, by any name a request may use."""
    target = await state.resolve(name)
    if target.adapter is None:
        return {**_base_object(target.model), "id": name}
    return _adapter_object(target.model, name, target.adapter.created_s)


def _base_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.base.name,
        "object": "model",
        "created": model.base.created_s,
        "owned_by": OWNER,
        "root": model.base.name,
        "parent": None,
        "max_model_len": model.max_context_tokens,
    }


def _adapter_object(model: ServedModel, name: str, created_s: int) -> dict[str, Any]:
    return {**_base_object(model), "id": name, "created": created_s, "parent": model.base.name}
