"""Registering, replacing and removing adapters while the server runs.

The order of a registration makes every interruption harmless: the files are imported under their digest, the replica
accepts the version, and only then does the name change over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rekindle.catalog.records import check_name
from rekindle.errors import Conflict, InvalidRequest, NotFound, RekindleError
from rekindle.gateway.adapter_versions import AdapterVersions
from rekindle.gateway.schemas import AdapterBody
from rekindle.gateway.seams import AdapterImporter, Catalog, ListedAdapter, RegisteredAdapter, ServedBase
from rekindle.gateway.worker_threads import WorkerThreads
from rekindle.protocol.adapters import AdapterManifest
from rekindle.store.adapter_source import resolve_source


@dataclass(frozen=True, slots=True)
class Registered:
    """The adapter as it is now; `is_new` says that the name did not exist before."""

    adapter: RegisteredAdapter
    is_new: bool


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


class AdapterRegistry:
    """The adapters of this server's base models; changes to one name happen one after the other."""

    def __init__(
        self,
        bases: Sequence[ServedBase],
        catalog: Catalog,
        import_adapter: AdapterImporter,
        versions: AdapterVersions,
        roots: Sequence[Path],
        importers: WorkerThreads,
    ) -> None:
        self._bases = {name: base for base in bases for name in base.names}
        self._by_digest = {base.manifest.digest: base for base in bases}
        self._catalog = catalog
        self._import_adapter = import_adapter
        self._versions = versions
        self._roots = tuple(roots)
        self._importers = importers
        self._turns: dict[str, _Turn] = {}

    async def names(self) -> Sequence[ListedAdapter]:
        """All adapters of the bases served here, by name."""
        return await asyncio.to_thread(self._catalog.adapter_names, self._by_digest)

    async def page(self, after: str | None, limit: int) -> Sequence[RegisteredAdapter]:
        """The next `limit` adapters of the bases served here, by name, beginning after the name `after`."""
        return await asyncio.to_thread(self._catalog.adapter_page, self._by_digest, after, limit)

    async def get(self, name: str) -> RegisteredAdapter:
        """The adapter of that name.

        Raises:
            NotFound: there is none, or its base is not served here.
        """
        adapter = await asyncio.to_thread(self._catalog.adapter, name)
        if adapter.manifest.base not in self._by_digest:
            raise NotFound(
                f"the adapter {name!r} belongs to the base {adapter.base_name!r}, which this server does not serve",
                field="name",
                code="adapter_not_found",
            )
        return adapter

    def base_of(self, adapter: RegisteredAdapter) -> ServedBase:
        """The base an adapter of this registry is bound to."""
        return self._by_digest[adapter.manifest.base]

    async def register(self, body: AdapterBody) -> Registered:
        """Import `body.source` and let the name stand for it; requests in flight keep the version they began with.

        Raises:
            RequestError: the name, the source or the adapter is not acceptable; nothing has changed then.
        """
        self._check_name(body.name)
        base = self._base(body.base_model)
        base_name = body.base_model or base.name
        async with self._turn(body.name):
            before = await self._find(body.name)
            if before is not None and before.manifest.base != base.manifest.digest:
                raise Conflict(
                    f"the adapter {body.name!r} belongs to the base {before.base_name!r}, not {base_name!r}; remove it "
                    "first or choose another name",
                    field="name",
                )
            source = await self._importers.run(self._allowed_source, body.source)
            manifest, path = await self._importers.run(self._import_adapter, source, base.manifest)
            adapter = await self._switch(body.name, base, base_name, manifest, path, source)
            if before is not None and before.manifest.digest != manifest.digest:
                await self._versions.retire_unless_named(before.manifest)
            return Registered(adapter, is_new=before is None)

    async def remove(self, name: str) -> RegisteredAdapter:
        """Forget the name; requests in flight finish.

        Raises:
            NotFound: there is no such adapter.
        """
        async with self._turn(name):
            await self.get(name)
            removed = await asyncio.to_thread(self._catalog.remove_adapter, name)
            await self._versions.retire_unless_named(removed.manifest)
            return removed

    async def _switch(
        self, name: str, base: ServedBase, base_name: str, manifest: AdapterManifest, path: Path, source: Path
    ) -> RegisteredAdapter:
        """Tell the replica, then the catalog; where either fails, the replica forgets it again."""
        try:
            await self._versions.announce(base, manifest, path)
            return await asyncio.to_thread(self._catalog.register_adapter, name, base_name, manifest, source)
        except RekindleError:
            await self._versions.retire_unless_named(manifest)
            raise

    async def _find(self, name: str) -> RegisteredAdapter | None:
        try:
            return await asyncio.to_thread(self._catalog.adapter, name)
        except NotFound:
            return None

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        turn = self._turns.setdefault(name, _Turn())
        turn.num_users += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.num_users -= 1
            if not turn.num_users:
                del self._turns[name]

    def _check_name(self, name: str) -> None:
        check_name(name)
        if name in self._bases:
            raise Conflict(f"{name!r} is the name of a base model; choose another", field="name")

    def _base(self, name: str | None) -> ServedBase:
        served = ", ".join(sorted(self._bases))
        if name is None:
            if len(self._by_digest) == 1:
                return next(iter(self._by_digest.values()))
            raise InvalidRequest(
                f"Missing required parameter: `base_model`; this server serves {served}", field="base_model"
            )
        if name not in self._bases:
            raise NotFound(
                f"no base model is named {name!r}; this server serves {served}",
                field="base_model",
                code="model_not_found",
            )
        return self._bases[name]

    def _allowed_source(self, source: str) -> Path:
        try:
            return resolve_source(source, self._roots)
        except (OSError, ValueError) as error:  # a name too long, or one no file system can hold
            raise InvalidRequest(f"`source` is not a path: {error}", field="source", code="invalid_value") from error
