"""The gateway's own objects, made once from its services and shared by the routes."""

from __future__ import annotations

import asyncio

from fastapi import Request

from rekindle.errors import NotFound
from rekindle.gateway.adapter_registry import AdapterRegistry
from rekindle.gateway.adapter_versions import AdapterVersions
from rekindle.gateway.jobs import JobFactory, Target
from rekindle.gateway.metrics import GatewayMetrics
from rekindle.gateway.reply import JobRunner
from rekindle.gateway.seams import Services
from rekindle.gateway.served_model import ServedModel

SHOWN_NAME_CHARS = 200


class GatewayState:
    """Joins the parts of one gateway."""

    def __init__(self, services: Services) -> None:
        """Load the text side of every base.

        Raises:
            ConfigurationError: a base's tokenizer or settings cannot be read.
        """
        self.services = services
        self.models = {base.manifest.digest: ServedModel(base, services.clock) for base in services.bases}
        self.metrics = GatewayMetrics(services.bases, services.clock)
        versions = AdapterVersions()
        self.adapters = AdapterRegistry(
            services.bases, services.catalog, services.import_adapter, versions, services.settings.adapter_roots
        )
        self.jobs = JobFactory(services.settings, services.clock)
        self.runner = JobRunner(versions, self.metrics, services.lifecycle, services.settings)

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
