"""The catalog's tables, in types that SQLite and PostgreSQL both have. `migrations` builds and changes them."""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Integer, MetaData, String, Table, Text

MAX_NAME_CHARS = 256

metadata = MetaData()

state = Table(
    "catalog_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("generation", BigInteger, nullable=False),
)
"""One row. Every writing transaction begins by raising `generation`, which makes writers wait for one another."""

models = Table(
    "models",
    metadata,
    Column("name", String(MAX_NAME_CHARS), primary_key=True),
    Column("digest", String(64), nullable=False, index=True),
    Column("manifest", JSON, nullable=False),
    Column("created_s", BigInteger, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(MAX_NAME_CHARS), primary_key=True),
    Column("base_name", String(MAX_NAME_CHARS), ForeignKey("models.name"), nullable=False, index=True),
    Column("version", Integer, nullable=False),
)
"""Names of adapters; `version` is the current one of `adapter_versions`."""

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("adapter_name", String(MAX_NAME_CHARS), ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), nullable=False, index=True),
    Column("base_digest", String(64), nullable=False),
    Column("manifest", JSON, nullable=False),
    Column("source", Text, nullable=False),
    Column("created_s", BigInteger, nullable=False),
)
