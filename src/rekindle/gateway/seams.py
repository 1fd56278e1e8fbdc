"""What the gateway needs from the rest of the system, as protocols; a composition root supplies the parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rekindle.clock import Clock, SystemClock
from rekindle.gateway.lifecycle import Lifecycle
from rekindle.gateway.settings import GatewaySettings
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.estimates import StageEstimate
from rekindle.protocol.generation import GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest, ModelDigest
from rekindle.protocol.models import ModelManifest
from rekindle.protocol.replica import EngineReady, EngineStats
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.protocol.tiers import Snapshot


class Replica(Protocol):
    """One engine, behind whatever keeps it alive."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks of one sequence, without gaps; closing the generator aborts the sequence. The generator holds a
        bounded number of chunks, and raises `Overloaded`, `ReplicaUnavailable`, `EngineFailed` or `InvalidRequest`."""
        ...

    async def add_adapter(self, manifest: AdapterManifest, path: Path) -> None:
        """Make a version known; repeating it is harmless."""
        ...

    async def remove_adapter(self, digest: AdapterDigest) -> None:
        """Forget a version; unknown ones are ignored."""
        ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def ready(self) -> EngineReady | None: ...

    @property
    def stats(self) -> EngineStats | None: ...

    @property
    def last_start_s(self) -> Sequence[tuple[str, float]]: ...

    @property
    def start_estimates(self) -> Sequence[StageEstimate]: ...

    @property
    def restarts_total(self) -> int: ...

    @property
    def wakes_total(self) -> int: ...


def load_estimates(replica: Replica) -> tuple[StageEstimate, ...]:
    """All that is known of how long a replica's loads and its start are likely to take."""
    return (*(() if replica.stats is None else replica.stats.load_estimates), *replica.start_estimates)


class RegisteredAdapter(Protocol):
    """The version an adapter's name stands for now. `path` is the stored file, `created_s` in Unix seconds."""

    @property
    def name(self) -> str: ...
    @property
    def base_name(self) -> str: ...
    @property
    def manifest(self) -> AdapterManifest: ...
    @property
    def path(self) -> Path: ...
    @property
    def created_s(self) -> int: ...


class ListedAdapter(Protocol):
    """What a list of all adapters says of each; `created_s` in Unix seconds."""

    @property
    def name(self) -> str: ...
    @property
    def base(self) -> ModelDigest: ...
    @property
    def created_s(self) -> int: ...


class Resolution(Protocol):
    """What a request's `model` field means at this moment. `adapter` is None for a base model."""

    @property
    def base_digest(self) -> ModelDigest: ...
    @property
    def adapter(self) -> RegisteredAdapter | None: ...


class Catalog(Protocol):
    """The names that exist. Calls block, so the gateway makes them in threads."""

    def resolve(self, model: str) -> Resolution:
        """A base or an adapter of that whole name, else `base:adapter`; raises `NotFound`."""
        ...

    def adapter_names(self, bases: Collection[ModelDigest]) -> Sequence[ListedAdapter]:
        """All adapters of these bases, by name."""
        ...

    def adapter_page(
        self, bases: Collection[ModelDigest], after: str | None, limit: int
    ) -> Sequence[RegisteredAdapter]:
        """The next `limit` adapters of these bases, by name, each in its current version."""
        ...

    def is_named(self, digest: AdapterDigest) -> bool:
        """Whether a name stands for this version now."""
        ...

    def adapter(self, name: str) -> RegisteredAdapter:
        """One adapter in its current version; raises `NotFound`."""
        ...

    def register_adapter(self, name: str, base_name: str, manifest: AdapterManifest, source: Path) -> RegisteredAdapter:
        """Let the name stand for this imported version; raises `Conflict` where it is a model's or another base's."""
        ...

    def remove_adapter(self, name: str) -> RegisteredAdapter:
        """Forget the name and return what it stood for; raises `NotFound`."""
        ...


class AdapterImporter(Protocol):
    """Brings an adapter's files into the store. Blocks."""

    def __call__(self, source: Path, base: ModelManifest) -> tuple[AdapterManifest, Path]:
        """The version and the file it is stored in; raises `AdapterRejected`. Repeating an import is harmless."""
        ...


@dataclass(frozen=True, slots=True)
class ServedBase:
    """A base model this server runs. `created_s` is when it was imported, in Unix seconds; `other_names` are more
    names of the same model."""

    name: str
    manifest: ModelManifest
    directory: Path
    replica: Replica
    created_s: int
    other_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.other_names)


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a gateway works with."""

    bases: tuple[ServedBase, ...]
    catalog: Catalog
    import_adapter: AdapterImporter
    settings: GatewaySettings = field(default_factory=GatewaySettings)
    clock: Clock = field(default_factory=SystemClock)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    host_memory: Callable[[], Awaitable[Snapshot]] | None = None
    """What is in the machine's host-memory tier now; raises `InternalError` if it cannot be told."""
    storage: StorageProfile = DEFAULT_PROFILE
    """How engines read from the home's filesystem."""
