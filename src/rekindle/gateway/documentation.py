"""Request bodies in the OpenAPI page. Routes read their bodies themselves, so the schemas are declared here."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def body_schema(schema: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a JSON body of this schema."""
    content = schema.model_json_schema(mode="validation")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": content}}}}
