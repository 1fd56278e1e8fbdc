"""What exists, by name: base models, adapters, and the versions of adapters.

Files come first and the row last: a row is written only while the files it names exist, and files are deleted only
while no row names them, both inside a transaction that other writers wait for. A process killed in between leaves files
without a row. Removing or replacing a name deletes nothing, since requests on what it stood for may be running;
`remove_unreferenced` does, while no process uses the files. Several processes may use one catalog.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, Row, Select, delete, func, insert, select, update
from sqlalchemy.exc import DatabaseError, OperationalError

from rekindle.catalog.files import FileStore
from rekindle.catalog.records import AdapterName, AdapterRecord, ModelRecord, Resolved, check_name
from rekindle.catalog.schema import BUSY_TIMEOUT_S, WRITES, open_engine
from rekindle.catalog.tables import MAX_NAME_CHARS, adapter_versions, adapters, models, state
from rekindle.clock import Clock, SystemClock
from rekindle.closing import Closing
from rekindle.errors import ConfigurationError, Conflict, NotFound, RetryLater
from rekindle.protocol.adapters import ADAPTER_FILE_NAME, AdapterManifest
from rekindle.protocol.identity import AdapterDigest, ModelDigest
from rekindle.protocol.models import ModelManifest

_MAX_CACHED_MANIFESTS = 1000
"""A manifest of 210 matrices takes about 70 kB of memory."""
_DIGESTS_PER_QUERY = 500

_CURRENT = (adapters.c.name == adapter_versions.c.adapter_name) & (adapters.c.version == adapter_versions.c.version)
_ADAPTER_COLUMNS = (
    adapters.c.name, adapters.c.base_name, adapter_versions.c.version, adapter_versions.c.digest,
    adapter_versions.c.source, adapter_versions.c.created_s,
)  # fmt: skip


class Catalog(Closing):
    """The catalog of one home directory. Calls block for a short time and may come from any thread."""

    def __init__(self, engine: Engine, home: FileStore, clock: Clock) -> None:
        """Use `open` instead, which also brings the tables up to date."""
        self._engine, self._home, self._clock = engine, home, clock
        self._writer = engine.execution_options(**{WRITES: True})
        self._manifests: dict[str, AdapterManifest] = {}

    @classmethod
    def open(cls, home: FileStore, clock: Clock | None = None) -> Catalog:
        """Open the catalog of `home`, created if there is none; close it after use.

        Raises:
            ConfigurationError: the file is damaged, or a newer version of Rekindle has written it.
        """
        with _database_errors():
            return cls(open_engine(home.catalog), home, clock or SystemClock())

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def models(self) -> list[ModelRecord]:
        """All base models, by name."""
        with self._reading() as connection:
            return [self._model(row) for row in connection.execute(select(models).order_by(models.c.name))]

    def model(self, name: str) -> ModelRecord:
        """One base model; raises `NotFound`."""
        with self._reading() as connection:
            return self._model(_model_row(connection, name))

    def check_new_name(self, name: str) -> None:
        """Whether a model could be added under `name` now.

        Raises:
            InvalidRequest: it is not a possible name.
            Conflict: a model or an adapter has it.
        """
        check_name(name)
        with self._reading() as connection:
            if connection.execute(select(models.c.name).where(models.c.name == name)).first():
                raise Conflict(f"a model is named {name!r} already; remove it first, or choose another name")
            _refuse_adapter_name(connection, name)

    def add_model(self, name: str, manifest: ModelManifest) -> ModelRecord:
        """Give an imported model a name; repeating it changes nothing.

        Raises:
            InvalidRequest: it is not a possible name.
            Conflict: an adapter or another model has the name, or the model's files are gone.
        """
        check_name(name)
        with self._writing() as connection:
            existing = connection.execute(select(models).where(models.c.name == name)).first()
            if existing is None:
                _refuse_adapter_name(connection, name)
                _require_files(self._home.model_directory(manifest.digest))
                values = {"name": name, "digest": manifest.digest, "manifest": msgspec.to_builtins(manifest)}
                connection.execute(insert(models).values(**values, created_s=self._now_s()))
            elif existing.digest != manifest.digest:
                raise Conflict(
                    f"{name!r} names another model ({existing.digest[:12]}); remove it first, or choose another name"
                )
            return self._model(_model_row(connection, name))

    def remove_model(self, name: str) -> ModelRecord:
        """Forget a model and return what it was; its files stay until `remove_unreferenced`.

        Raises:
            NotFound: there is no such model.
            Conflict: adapters are bound to it.
        """
        with self._writing() as connection:
            record = self._model(_model_row(connection, name))
            bound = list(connection.scalars(select(adapters.c.name).where(adapters.c.base_name == name)))
            if bound:
                raise Conflict(
                    f"{len(bound)} adapters are bound to the model {name!r}, such as {bound[0]!r}; remove them first"
                )
            connection.execute(delete(models).where(models.c.name == name))
            return record

    def adapters(self, base_name: str | None = None) -> list[AdapterRecord]:
        """All adapters, or those of one base, by name, each in its current version."""
        query = select(*_ADAPTER_COLUMNS).join(adapter_versions, _CURRENT).order_by(adapters.c.name)
        if base_name is not None:
            query = query.where(adapters.c.base_name == base_name)
        with self._reading() as connection:
            return self._adapters(connection, query)

    def adapter_names(self, bases: Collection[ModelDigest]) -> list[AdapterName]:
        """The adapters of these bases, by name, without their manifests."""
        query = select(adapters.c.name, adapter_versions.c.base_digest, adapter_versions.c.created_s)
        query = query.join(adapter_versions, _CURRENT).where(adapter_versions.c.base_digest.in_(bases))
        with self._reading() as connection:
            return [AdapterName(*row) for row in connection.execute(query.order_by(adapters.c.name))]

    def adapter_page(self, bases: Collection[ModelDigest], after: str | None, limit: int) -> list[AdapterRecord]:
        """The next `limit` adapters of these bases, by name, beginning after the name `after`."""
        query = select(*_ADAPTER_COLUMNS).join(adapter_versions, _CURRENT).order_by(adapters.c.name).limit(limit)
        query = query.where(adapter_versions.c.base_digest.in_(bases))
        if after is not None:
            query = query.where(adapters.c.name > after)
        with self._reading() as connection:
            return self._adapters(connection, query)

    def is_named(self, digest: AdapterDigest) -> bool:
        """Whether a name stands for this version now."""
        query = select(adapters.c.name).join(adapter_versions, _CURRENT).where(adapter_versions.c.digest == digest)
        with self._reading() as connection:
            return connection.execute(query.limit(1)).first() is not None

    def adapter(self, name: str) -> AdapterRecord:
        """One adapter in its current version; raises `NotFound`."""
        with self._reading() as connection:
            return self._adapter(connection, name)

    def register_adapter(
        self, name: str, base_name: str, manifest: AdapterManifest, source: str | Path
    ) -> AdapterRecord:
        """Let `name` stand for an imported version from now on; registering its current version again changes nothing.

        Raises:
            InvalidRequest: it is not a possible name.
            NotFound: there is no such base.
            Conflict: a model or an adapter of another base has the name, or the version is bound to another base.
        """
        check_name(name)
        with self._writing() as connection:
            base = _model_row(connection, base_name)
            if connection.execute(select(models.c.name).where(models.c.name == name)).first():
                raise Conflict(f"{name!r} is the name of a base model; choose another", field="name")
            if manifest.base != base.digest:
                raise Conflict(
                    f"this version is bound to the model {manifest.base[:12]}, but {base_name!r} is "
                    f"{base.digest[:12]}; import the adapter again"
                )
            _require_files(self._home.adapter_directory(manifest.digest))
            current = connection.execute(select(adapters).where(adapters.c.name == name)).first()
            if current is not None and current.base_name != base_name:
                raise Conflict(
                    f"the adapter {name!r} is bound to {current.base_name!r}; remove it first, or choose another name",
                    field="name",
                )
            if current is None or self._adapter(connection, name).manifest.digest != manifest.digest:
                self._add_version(connection, name, base_name, manifest, str(source))
            return self._adapter(connection, name)

    def remove_adapter(self, name: str) -> AdapterRecord:
        """Forget an adapter with all its versions and return what it stood for. Its files stay until
        `remove_unreferenced`, since requests on them may be running. Raises `NotFound`."""
        with self._writing() as connection:
            record = self._adapter(connection, name)
            connection.execute(delete(adapters).where(adapters.c.name == name))
            return record

    def resolve(self, model: str) -> Resolved:
        """What `model` in a request means: a base or an adapter of that whole name, else `base:adapter`, split at any
        colon that leaves a base on the left and an adapter of it on the right.

        Raises:
            NotFound: nothing of that name exists (code `model_not_found`).
        """
        with self._reading() as connection:
            if len(model) <= 2 * MAX_NAME_CHARS + 1 and (found := self._resolve(connection, model)):
                return found
        raise NotFound(f"the model {model[:200]!r} does not exist", field="model", code="model_not_found")

    def remove_unreferenced(self) -> list[Path]:
        """Forget versions that were replaced, delete all files that no name stands for, and return their directories.

        Nothing happens while any process uses the home, this one included.
        """
        with self._home.alone() as is_alone:
            if not is_alone:
                return []
            with self._writing() as connection:
                is_current = select(adapters.c.name).where(_CURRENT).exists()
                connection.execute(delete(adapter_versions).where(~is_current))
            with self._writing() as connection:
                named = _named_digests(connection)
                stored = [*self._home.models.iterdir(), *self._home.adapters.iterdir()]
                unreferenced = sorted(path for path in stored if path.name not in named)
                for path in unreferenced:
                    self._home.remove(path)
                return unreferenced

    def discard(self, directory: Path) -> bool:
        """Delete the files of a model or version that nobody can be using, unless a row names them; returns whether
        they were deleted."""
        with self._writing() as connection:
            if directory.name in _named_digests(connection) or not directory.exists():
                return False
            self._home.remove(directory)
            return True

    def _resolve(self, connection: Connection, name: str) -> Resolved | None:
        colons = [i for i, character in enumerate(name) if character == ":"]
        prefixes = [name, *(name[:i] for i in colons)]
        suffixes = [name, *(name[i + 1 :] for i in colons)]
        rows = connection.execute(select(models.c.name, models.c.digest).where(models.c.name.in_(prefixes)))
        bases: dict[str, ModelDigest] = {row.name: row.digest for row in rows}
        if name in bases:
            return Resolved(name, bases[name])
        query = select(*_ADAPTER_COLUMNS).join(adapter_versions, _CURRENT).where(adapters.c.name.in_(suffixes))
        found = {record.name: record for record in self._adapters(connection, query)}
        if whole := found.get(name):
            return Resolved(whole.base_name, whole.manifest.base, whole)
        for i in colons:
            base_name, adapter = name[:i], found.get(name[i + 1 :])
            if adapter and bases.get(base_name) == adapter.manifest.base:
                return Resolved(base_name, adapter.manifest.base, adapter)
        return None

    def _add_version(
        self, connection: Connection, name: str, base_name: str, manifest: AdapterManifest, source: str
    ) -> None:
        newest = select(func.max(adapter_versions.c.version)).where(adapter_versions.c.adapter_name == name)
        version = (connection.execute(newest).scalar() or 0) + 1
        if version == 1:
            connection.execute(insert(adapters).values(name=name, base_name=base_name, version=version))
        else:
            connection.execute(update(adapters).where(adapters.c.name == name).values(version=version))
        connection.execute(
            insert(adapter_versions).values(
                adapter_name=name,
                version=version,
                digest=manifest.digest,
                base_digest=manifest.base,
                manifest=msgspec.to_builtins(manifest),
                source=source,
                created_s=self._now_s(),
            )
        )

    def _model(self, row: Row[Any]) -> ModelRecord:
        manifest = msgspec.convert(row.manifest, ModelManifest)
        return ModelRecord(row.name, manifest, self._home.model_directory(manifest.digest), row.created_s)

    def _adapter(self, connection: Connection, name: str) -> AdapterRecord:
        query = select(*_ADAPTER_COLUMNS).join(adapter_versions, _CURRENT).where(adapters.c.name == name)
        found = self._adapters(connection, query)
        if not found:
            raise NotFound(f"no adapter is named {name!r}", field="name", code="adapter_not_found")
        return found[0]

    def _adapters(self, connection: Connection, query: Select[Any]) -> list[AdapterRecord]:
        rows = connection.execute(query).all()
        manifests = self._manifests_of(connection, {row.digest for row in rows})
        return [
            AdapterRecord(
                name=row.name,
                base_name=row.base_name,
                version=row.version,
                manifest=manifests[row.digest],
                path=self._home.adapter_directory(row.digest) / ADAPTER_FILE_NAME,
                source=row.source,
                created_s=row.created_s,
            )
            for row in rows
        ]

    def _manifests_of(self, connection: Connection, digests: set[str]) -> dict[str, AdapterManifest]:
        """Manifests never change under their digest, so those seen before are not read again."""
        cached = self._manifests
        found = {digest: manifest for digest in digests if (manifest := cached.get(digest)) is not None}
        absent = sorted(digests - found.keys())
        for start in range(0, len(absent), _DIGESTS_PER_QUERY):
            part = absent[start : start + _DIGESTS_PER_QUERY]
            query = select(adapter_versions.c.digest, adapter_versions.c.manifest)
            for row in connection.execute(query.where(adapter_versions.c.digest.in_(part))):
                found[row.digest] = msgspec.convert(row.manifest, AdapterManifest)
        if absent:
            self._manifests = found if len(cached) > _MAX_CACHED_MANIFESTS else cached | found
        return found

    def _reading(self) -> AbstractContextManager[Connection]:
        return _transaction(self._engine)

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with _transaction(self._writer) as connection:
            connection.execute(update(state).values(generation=state.c.generation + 1))
            yield connection

    def _now_s(self) -> int:
        return int(self._clock.unix_s())


@contextmanager
def _transaction(engine: Engine) -> Iterator[Connection]:
    with _database_errors(), engine.begin() as connection:
        yield connection


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        if "locked" in str(error.orig):
            raise RetryLater(
                f"another process has kept the catalog locked for {BUSY_TIMEOUT_S} s", retry_after_s=1.0
            ) from error
        raise ConfigurationError(f"the catalog cannot be used: {error.orig}") from error
    except DatabaseError as error:
        raise ConfigurationError(
            f"the catalog is damaged: {error.orig}; restore catalog.db from a copy, or move it away and import again"
        ) from error


def _model_row(connection: Connection, name: str) -> Row[Any]:
    row = connection.execute(select(models).where(models.c.name == name)).first()
    if row is None:
        raise NotFound(f"no model is named {name!r}", field="model", code="model_not_found")
    return row


def _refuse_adapter_name(connection: Connection, name: str) -> None:
    if connection.execute(select(adapters.c.name).where(adapters.c.name == name)).first():
        raise Conflict(f"{name!r} is the name of an adapter; choose another", field="name")


def _require_files(directory: Path) -> None:
    if not directory.is_dir():
        raise Conflict(f"the files of {directory.name[:12]} are not in the store; import them again")


def _named_digests(connection: Connection) -> set[str]:
    digests = connection.scalars(select(models.c.digest).union(select(adapter_versions.c.digest)))
    return set(digests)
