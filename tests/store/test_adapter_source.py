"""Which directories a client may name as the source of an adapter."""

import json
import os
from pathlib import Path

import pytest

from rekindle.errors import AdapterRejected, InvalidRequest, ModelRejected
from rekindle.store.adapter_source import open_source, resolve_source
from rekindle.store.source_files import chat_template


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "team" / "adapter").mkdir(parents=True)
    (tmp_path / "root-secret" / "adapter").mkdir(parents=True)
    return tmp_path / "root"


def refusal(source: str, *roots: Path) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        resolve_source(source, roots)
    assert caught.value.field == "source"
    return caught.value


def test_a_directory_under_a_root_is_found_by_absolute_and_relative_name(root: Path, tmp_path: Path) -> None:
    expected = root / "team" / "adapter"
    for source in (str(expected), "team/adapter", "./team/../team/adapter/"):
        assert resolve_source(source, [root]) == expected
    (tmp_path / "second" / "other").mkdir(parents=True)
    assert resolve_source("other", [root, tmp_path / "second"]) == tmp_path / "second" / "other"


def test_a_root_that_is_a_link_counts_where_it_leads(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert resolve_source("team/adapter", [tmp_path / "link"]) == root / "team" / "adapter"
    assert resolve_source(str(root / "team"), [tmp_path / "link"]) == root / "team"


@pytest.mark.parametrize("source", ["..", "../root-secret/adapter", "/etc", "/", "team/../../root-secret", "a\0b"])
def test_what_lies_outside_every_root_is_refused(root: Path, source: str) -> None:
    error = refusal(source, root)
    assert error.code == "source_not_allowed"
    assert "server.adapter_roots" in str(error)


def test_the_answer_does_not_tell_whether_something_outside_exists(root: Path, tmp_path: Path) -> None:
    present, absent = tmp_path / "root-secret" / "adapter", tmp_path / "root-secret" / "absent0"
    answers = {str(refusal(str(path), root)).replace(str(path), "x") for path in (present, absent)}
    assert len(answers) == 1


def test_nothing_is_allowed_without_roots(root: Path) -> None:
    assert "no directory is allowed" in str(refusal(str(root / "team" / "adapter")))


def test_links_out_of_the_roots_are_refused_for_directories_and_for_files(root: Path, tmp_path: Path) -> None:
    (root / "way-out").symlink_to(tmp_path / "root-secret" / "adapter")
    assert refusal("way-out", root).code == "source_not_allowed"
    (tmp_path / "secret.json").write_text("{}")
    (root / "team" / "adapter" / "adapter_config.json").symlink_to(tmp_path / "secret.json")
    assert "adapter_config.json" in str(refusal("team/adapter", root))


def test_links_inside_the_roots_are_followed(root: Path) -> None:
    (root / "blob").write_text("{}")
    (root / "team" / "adapter" / "adapter_config.json").symlink_to(root / "blob")
    (root / "alias").symlink_to(root / "team" / "adapter")
    assert resolve_source("alias", [root]) == root / "team" / "adapter"


def test_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "loop").symlink_to(root / "loop")
    refusal("loop", root)


def test_an_absent_directory_under_a_root_and_a_file_are_told_apart_from_a_forbidden_one(root: Path) -> None:
    (root / "file").write_text("")
    for source in ("absent", "file"):
        assert refusal(source, root).code == "source_not_found"


def test_a_pipe_in_place_of_a_file_does_not_hang_the_import(root: Path) -> None:
    directory = root / "team" / "adapter"
    os.mkfifo(directory / "adapter_config.json")
    with pytest.raises(AdapterRejected, match=r"no adapter_config\.json"):
        open_source(directory)


def test_an_oversized_configuration_is_refused_unread(root: Path) -> None:
    directory = root / "team" / "adapter"
    with (directory / "adapter_config.json").open("wb") as file:
        file.truncate(1 << 33)
    (directory / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterRejected, match=r"adapter_config\.json is larger than"):
        open_source(directory)


def test_weights_whose_header_takes_more_than_an_adapter_needs_are_refused_unread(root: Path) -> None:
    directory = root / "team" / "adapter"
    (directory / "adapter_config.json").write_text("{}")
    with (directory / "adapter_model.safetensors").open("wb") as file:
        file.write((50_000_000).to_bytes(8, "little"))
        file.truncate(60_000_000)
    with pytest.raises(AdapterRejected, match="its header would be 50000000 bytes, at most 4194304 are allowed"):
        open_source(directory)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (["{{ messages }}"], "must list objects with a name and a template, not {{ messages }}"),
        ([{"name": "a", "template": "A"}, {"name": "b", "template": "B"}], "templates a, b is named 'default'"),
        ([{"name": "default", "template": 7}], "must be text or a list of named ones, not int"),
    ],
)
def test_a_chat_template_that_cannot_be_told_is_refused(root: Path, stored: object, reason: str) -> None:
    (root / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    for rejected in (AdapterRejected, ModelRejected):
        with pytest.raises(rejected, match=reason):
            chat_template(root, rejected)
