"""The gateway's own objects, made once from its services and shared by the routes."""

from __future__ import annotations

import asyncio

from fastapi import Request

from rekindle.errors import NotFound
from rekindle.gateway.adapter_registry import AdapterRegistry
from rekindle.gateway.adapter_versions import AdapterVersions
from rekindle.gateway.fields import KnownFields
from rekindle.gateway.jobs import JobFactory, Target
from rekindle.gateway.metrics import GatewayMetrics
from rekindle.gateway.reply import JobRunner
from rekindle.gateway.schemas import Body, parse_body
from rekindle.gateway.seams import Services
from rekindle.gateway.served_model import ServedModel
from rekindle.gateway.worker_threads import WorkerThreads

SHOWN_NAME_CHARS = 200
INLINE_BODY_BYTES = 1 << 16
"""Bodies up to this size are read on the event loop (about a millisecond), larger ones in a thread."""
NUM_TEXT_THREADS = 4
"""Rendering holds the interpreter lock, encoding does not."""
NUM_IMPORT_THREADS = 2


class GatewayState:
    """Joins the parts of one gateway."""

    def __init__(self, services: Services) -> None:
        """Load the text side of every base.

        Raises:
            ConfigurationError: a base's tokenizer, chat template or settings cannot be used.
        """
        self.services = services
        self.texts = WorkerThreads("text", NUM_TEXT_THREADS)
        self.models = {base.manifest.digest: ServedModel(base, services.clock, self.texts) for base in services.bases}
        self.metrics = GatewayMetrics(services.bases, services.clock)
        versions = AdapterVersions(services.catalog)
        self.adapters = AdapterRegistry(
            services.bases,
            services.catalog,
            services.import_adapter,
            versions,
            services.settings.adapter_roots,
            WorkerThreads("import", NUM_IMPORT_THREADS),
        )
        self.jobs = JobFactory(services.settings, services.clock)
        self.runner = JobRunner(versions, self.metrics, services.lifecycle, services.settings)

    async def read_body(self, request: Request, schema: type[Body], known: KnownFields) -> Body:
        """The body of a request, as `parse_body` reads it."""
        raw = await request.body()
        if len(raw) <= INLINE_BODY_BYTES:
            return parse_body(raw, schema, known)
        return await self.texts.run(parse_body, raw, schema, known)

    async def resolve(self, name: str) -> Target:
        """What a request's `model` means now.

        Raises:
            NotFound: no such model or adapter, or its base is not served here.
        """
        shown = name[:SHOWN_NAME_CHARS]
        try:
            resolved = await asyncio.to_thread(self.services.catalog.resolve, name)
        except NotFound as error:
            raise NotFound(f"The model `{shown}` does not exist", field="model", code="model_not_found") from error
        model = self.models.get(resolved.base_digest)
        if model is None:
            raise NotFound(
                f"The model `{shown}` exists, but this server does not serve it; start it with that model",
                field="model",
                code="model_not_found",
            )
        return Target(name, model, resolved.adapter)


def state_of(request: Request) -> GatewayState:
    """The state of the application that serves this request."""
    state: GatewayState = request.app.state.gateway
    return state
