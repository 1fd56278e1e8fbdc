"""The home directory: whole directories or none, whatever happens to the process that builds them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.errors import ConfigurationError
from rekindle.protocol.identity import ModelDigest
from rekindle.store.home import Home

LeftIn = Callable[[Home], list[str]]
DIGEST = ModelDigest("d1")


def test_a_new_home_has_its_places(tmp_path: Path) -> None:
    home = Home(tmp_path / "deep" / "home")
    assert home.models.is_dir()
    assert home.adapters.is_dir()
    assert home.catalog == tmp_path / "deep" / "home" / "catalog.db"
    assert home.model_directory(DIGEST) == home.models / "d1"


def test_a_published_directory_is_whole_and_nothing_else_is_left(home: Home, left_in: LeftIn) -> None:
    with home.atomic_directory() as staging:
        (staging.path / "inner").mkdir()
        (staging.path / "inner" / "file").write_text("content")
        assert not home.model_directory(DIGEST).exists()
        staging.publish(home.model_directory(DIGEST))
    assert (home.model_directory(DIGEST) / "inner" / "file").read_text() == "content"
    assert left_in(home) == ["d1"]


def test_a_directory_that_is_there_already_is_kept(home: Home, left_in: LeftIn) -> None:
    for content in ("first", "second"):
        with home.atomic_directory() as staging:
            (staging.path / "file").write_text(content)
            staging.publish(home.model_directory(DIGEST))
    assert (home.model_directory(DIGEST) / "file").read_text() == "first"
    assert left_in(home) == ["d1"]


def test_what_fails_or_is_never_published_leaves_nothing(home: Home, left_in: LeftIn) -> None:
    with home.atomic_directory() as staging:
        (staging.path / "file").write_text("never published")
    with pytest.raises(RuntimeError, match="broken"), home.atomic_directory() as staging:
        (staging.path / "file").write_text("half")
        raise RuntimeError("broken")
    assert left_in(home) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_and_cleaned_up(home: Home, left_in: LeftIn, number: int) -> None:
    with pytest.raises(ConfigurationError, match=r"is full .*--home"), home.atomic_directory():
        raise OSError(number, os.strerror(number))
    assert left_in(home) == []


def test_too_little_space_is_known_beforehand(home: Home) -> None:
    home.require_free(1)
    with pytest.raises(ConfigurationError, match=r"free and 1e\+09 TiB are needed"):
        home.require_free(10**18 * 1100)


def test_opening_a_home_sweeps_what_dead_processes_left(home: Home, left_in: LeftIn) -> None:
    (home.temporary / "dead").mkdir()
    (home.temporary / "dead" / "model.safetensors").write_text("half")
    (home.temporary / "stray").write_text("file")
    (home.temporary / "link").symlink_to(home.root)
    Home(home.root)
    assert left_in(home) == []
    assert home.models.is_dir()


def test_opening_a_home_spares_what_is_still_being_built(home: Home, left_in: LeftIn) -> None:
    with home.atomic_directory() as staging:
        (staging.path / "file").write_text("in work")
        Home(home.root)
        staging.publish(home.model_directory(DIGEST))
    assert left_in(home) == ["d1"]


def test_a_removed_directory_is_gone(home: Home, left_in: LeftIn) -> None:
    home.model_directory(DIGEST).mkdir()
    (home.model_directory(DIGEST) / "file").write_text("content")
    home.remove(home.model_directory(DIGEST))
    assert left_in(home) == []


def test_a_home_that_cannot_be_made_says_how_to_choose_another(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(ConfigurationError, match="cannot be used: Not a directory; choose another with --home"):
        Home(tmp_path / "file" / "home")


def test_a_home_is_used_by_many_or_by_one_alone(home: Home) -> None:
    with home.alone() as is_alone, Home(home.root).alone() as is_other_alone:
        assert (is_alone, is_other_alone) == (True, False)
    with home.using(), Home(home.root).using(), home.alone() as is_alone:
        assert not is_alone
    with home.alone() as is_alone:
        assert is_alone


def test_an_error_of_a_clean_up_is_not_taken_for_a_busy_home(home: Home) -> None:
    with pytest.raises(BlockingIOError), home.alone():
        raise BlockingIOError
    with home.alone() as is_alone:
        assert is_alone
