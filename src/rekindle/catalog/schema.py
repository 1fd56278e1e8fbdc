"""Opening of the database file, and bringing its tables up to date."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, text

from rekindle.errors import ConfigurationError

HEAD_REVISION = "0001"
"""The newest of `migrations/versions`; a database that has it is opened without loading Alembic."""

BUSY_TIMEOUT_S = 20
WRITES = "rekindle_writes"
"""Execution option of a connection whose transactions write: they take SQLite's write lock at once, since one that
reads first and writes later can fail instead of waiting."""

_MIGRATIONS = Path(__file__).parent / "migrations"


def open_engine(path: Path) -> Engine:
    """Open the catalog at `path`, created if it does not exist, with its tables up to date.

    Raises:
        ConfigurationError: the file is no database, or a newer version of Rekindle has written it.
    """
    engine = create_engine(URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_TIMEOUT_S})
    event.listen(engine, "connect", _prepare_connection)
    event.listen(engine, "begin", _begin)
    with _one_process_at_a_time(path.with_suffix(".lock")):
        upgrade(engine)
    return engine


def upgrade(engine: Engine) -> None:
    """Run the migrations that the database has not had yet, all in one transaction."""
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        found = _revision(connection)
        if found != HEAD_REVISION:
            _migrate(connection, found)


def _migrate(connection: Connection, found: str | None) -> None:
    # Not at the top: a database that is up to date, which is nearly always so, is opened without it.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise ConfigurationError(
            f"the catalog was written by a newer version of Rekindle (schema {found}, this one knows up to "
            f"{HEAD_REVISION}); upgrade Rekindle, or use another home"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return revision


def _prepare_connection(connection: sqlite3.Connection, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where `_begin` says, not where the driver guesses
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES) else "BEGIN")


@contextmanager
def _one_process_at_a_time(lock: Path) -> Iterator[None]:
    """SQLite does not wait for others while a database is created and switched to write-ahead logging."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
