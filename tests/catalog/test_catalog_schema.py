"""The database file: migrations, versions from elsewhere, damage."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from rekindle.catalog import schema
from rekindle.catalog.catalog import Catalog
from rekindle.catalog.tables import metadata
from rekindle.errors import ConfigurationError, RetryLater
from rekindle.store.home import Home


def test_migrations_build_exactly_the_tables_that_queries_use(tmp_path: Path) -> None:
    engine = schema.open_engine(tmp_path / "catalog.db")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_the_known_head_is_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_current_head() == schema.HEAD_REVISION


def test_an_interrupted_first_migration_is_made_up_for(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with closing(sqlite3.connect(home.catalog)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    with Catalog.open(home) as catalog:
        assert catalog.models() == []


def test_a_catalog_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    home = Home(tmp_path)
    Catalog.open(home).close()
    with closing(sqlite3.connect(home.catalog)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(ConfigurationError, match=r"newer version of Rekindle \(schema 9999"):
        Catalog.open(home)


@pytest.mark.parametrize(
    "content", [b"this is not a database, and long enough to be seen as such" * 50, b"SQLite format 3\0" * 99]
)
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    home = Home(tmp_path)
    home.catalog.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"catalog\.db"):
        Catalog.open(home)


def test_a_path_with_odd_characters_is_no_problem(tmp_path: Path) -> None:
    home = Home(tmp_path / "100% ?mode=ro #1 [x]")
    with Catalog.open(home) as catalog:
        assert catalog.models() == []
    assert home.catalog.exists()


def test_a_lock_that_lasts_is_an_error_to_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BUSY_TIMEOUT_S", 0)
    home = Home(tmp_path)
    with Catalog.open(home) as catalog, closing(sqlite3.connect(home.catalog, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert catalog.models() == []
        with pytest.raises(RetryLater):
            catalog.remove_unreferenced()
        other.execute("ROLLBACK")
        assert catalog.remove_unreferenced() == []
