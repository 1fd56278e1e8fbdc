"""Names of models and adapters: adding, resolving, replacing, removing, and what becomes of the files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from rekindle.catalog.catalog import Catalog
from rekindle.clock import ManualClock
from rekindle.errors import Conflict, InvalidRequest, NotFound
from rekindle.protocol.adapters import AdapterManifest, LoraBinding
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.models import ModelManifest
from rekindle.store.home import Home
from support.adapter_files import base_manifest

BASE = base_manifest("a" * 64)
OTHER_BASE = base_manifest("c" * 64)


def version(digit: str, base: ModelManifest = BASE) -> AdapterManifest:
    binding = LoraBinding("model.layers.0.self_attn.q_proj", "q_proj", 0, 4, 2.0, 24, 24, 0, 128)
    return AdapterManifest(AdapterDigest(digit * 64), base.digest, "F32", 256, (4,), ("q_proj",), (binding,))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def catalog(home: Home) -> Iterator[Catalog]:
    with Catalog.open(home, ManualClock(1000.0)) as catalog:
        yield catalog


def add_base(catalog: Catalog, home: Home, name: str = "base", manifest: ModelManifest = BASE) -> None:
    home.model_directory(manifest.digest).mkdir(exist_ok=True)
    catalog.add_model(name, manifest)


def add_adapter(catalog: Catalog, home: Home, name: str, manifest: AdapterManifest, base_name: str = "base") -> None:
    home.adapter_directory(manifest.digest).mkdir(exist_ok=True)
    catalog.register_adapter(name, base_name, manifest, "/somewhere")


def test_a_new_catalog_is_empty(catalog: Catalog) -> None:
    assert catalog.models() == []
    assert catalog.adapters() == []


def test_models_and_adapters_survive_closing(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_adapter(catalog, home, "poet", version("1"))
    catalog.close()
    with Catalog.open(home) as reopened:
        [model], [adapter] = reopened.models(), reopened.adapters()
    assert (model.name, model.manifest, model.created_s) == ("base", BASE, 1000)
    assert model.path == home.model_directory(BASE.digest)
    assert (adapter.name, adapter.base_name, adapter.version, adapter.manifest) == ("poet", "base", 1, version("1"))
    assert adapter.path == home.adapter_directory(version("1").digest) / "adapter.safetensors"
    assert (adapter.source, adapter.created_s) == ("/somewhere", 1000)


def test_repeating_an_addition_changes_nothing(catalog: Catalog, home: Home) -> None:
    for _ in range(2):
        add_base(catalog, home)
        add_adapter(catalog, home, "poet", version("1"))
    assert len(catalog.models()) == 1
    assert catalog.adapter("poet").version == 1


def test_registering_again_makes_a_new_version_current(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    for digit in "121":
        add_adapter(catalog, home, "poet", version(digit))
    assert catalog.adapter("poet").version == 3
    assert catalog.adapter("poet").manifest == version("1")


def test_replaced_versions_are_deleted_and_their_numbers_not_used_again(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    for digit in "123":
        add_adapter(catalog, home, "poet", version(digit))
    add_adapter(catalog, home, "other", version("4"))
    add_adapter(catalog, home, "third", version("2"))
    assert catalog.remove_unreferenced() == [home.adapter_directory(version("1").digest)]
    assert catalog.adapter("poet").version == 3
    for name, digit in (("poet", "3"), ("other", "4"), ("third", "2")):
        assert catalog.adapter(name).manifest == version(digit)
        assert catalog.adapter(name).path.parent.exists()
    add_adapter(catalog, home, "poet", version("1"))
    assert catalog.adapter("poet").version == 4


@pytest.mark.parametrize(
    "name", ["", " base", "base ", "a\nb", "a\x00b", "x\u202ey", "a\tb", "n" * 257, "\ud800", ".", ".."]
)
def test_impossible_names_are_refused(catalog: Catalog, home: Home, name: str) -> None:
    add_base(catalog, home)
    home.adapter_directory(version("1").digest).mkdir()
    for attempt in (
        lambda: catalog.add_model(name, BASE),
        lambda: catalog.check_new_name(name),
        lambda: catalog.register_adapter(name, "base", version("1"), ""),
    ):
        with pytest.raises(InvalidRequest) as caught:
            attempt()
        assert caught.value.field == "name"


@pytest.mark.parametrize(
    "name", ["org/model", "a:b", ":", "Ünïcödé 模型", "two words", "n" * 256, "...", "x'; DROP TABLE"]
)
def test_possible_names_are_kept_as_they_are(catalog: Catalog, home: Home, name: str) -> None:
    add_base(catalog, home)
    add_adapter(catalog, home, name, version("1"))
    found = catalog.resolve(name).adapter
    assert found is not None
    assert found.name == name


def test_a_name_is_a_model_or_an_adapter_but_not_both(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_adapter(catalog, home, "poet", version("1"))
    with pytest.raises(Conflict):
        catalog.add_model("poet", BASE)
    with pytest.raises(Conflict):
        catalog.check_new_name("poet")
    with pytest.raises(Conflict):
        catalog.check_new_name("base")
    with pytest.raises(Conflict):
        catalog.register_adapter("base", "base", version("1"), "")
    catalog.check_new_name("free")


def test_a_model_name_cannot_change_its_meaning(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    home.model_directory(OTHER_BASE.digest).mkdir()
    with pytest.raises(Conflict, match="names another model"):
        catalog.add_model("base", OTHER_BASE)


def test_an_adapter_cannot_move_to_another_base(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_base(catalog, home, "other", OTHER_BASE)
    add_adapter(catalog, home, "poet", version("1"))
    with pytest.raises(Conflict, match="is bound to 'base'"):
        add_adapter(catalog, home, "poet", version("2", OTHER_BASE), "other")
    with pytest.raises(Conflict, match="bound to the model"):
        add_adapter(catalog, home, "new", version("1"), "other")
    with pytest.raises(NotFound):
        add_adapter(catalog, home, "new", version("1"), "absent")


def test_a_whole_name_is_looked_up_before_it_is_split(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_base(catalog, home, "base:poet", BASE)
    add_adapter(catalog, home, "poet", version("1"))
    assert catalog.resolve("base:poet").adapter is None
    add_adapter(catalog, home, "base:scribe", version("2"))
    add_adapter(catalog, home, "scribe", version("3"))
    found = catalog.resolve("base:scribe").adapter
    assert found is not None
    assert found.manifest.digest == version("2").digest


def test_a_name_is_split_at_any_colon_that_leaves_a_base(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home, "org/base:7b")
    add_adapter(catalog, home, "team:poet:v2", version("1"), "org/base:7b")
    resolved = catalog.resolve("org/base:7b:team:poet:v2")
    assert (resolved.base_name, resolved.base_digest) == ("org/base:7b", BASE.digest)
    assert resolved.adapter is not None
    assert (resolved.adapter.name, resolved.adapter.manifest.digest) == ("team:poet:v2", version("1").digest)


def test_both_names_of_one_model_lead_to_its_adapters(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_base(catalog, home, "alias")
    add_adapter(catalog, home, "poet", version("1"))
    assert catalog.resolve("alias:poet").base_name == "alias"
    assert catalog.resolve("poet").base_name == "base"


@pytest.mark.parametrize(
    "name", ["", "absent", "base:absent", "absent:poet", "other:poet", "poet:base", ":", "base:", ":" * 9999, "b\x00"]
)
def test_an_unknown_model_is_not_found_with_its_code(catalog: Catalog, home: Home, name: str) -> None:
    add_base(catalog, home)
    add_base(catalog, home, "other", OTHER_BASE)
    add_adapter(catalog, home, "poet", version("1"))
    with pytest.raises(NotFound) as caught:
        catalog.resolve(name)
    assert (caught.value.code, caught.value.field) == ("model_not_found", "model")


def test_adapters_can_be_listed_by_base(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_base(catalog, home, "other", OTHER_BASE)
    for name, manifest, base_name in (
        ("z", version("1"), "base"),
        ("a", version("2"), "base"),
        ("m", version("3", OTHER_BASE), "other"),
    ):
        add_adapter(catalog, home, name, manifest, base_name)
    assert [record.name for record in catalog.adapters()] == ["a", "m", "z"]
    assert [record.name for record in catalog.adapters("base")] == ["a", "z"]


def test_a_removed_adapter_is_gone_and_its_name_free(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_adapter(catalog, home, "poet", version("1"))
    assert catalog.remove_adapter("poet").manifest == version("1")
    for attempt in (catalog.remove_adapter, catalog.adapter, catalog.resolve):
        with pytest.raises(NotFound):
            attempt("poet")
    add_base(catalog, home, "poet")


def test_a_model_with_adapters_is_not_removed_before_them(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_adapter(catalog, home, "poet", version("1"))
    with pytest.raises(Conflict, match="poet"):
        catalog.remove_model("base")
    catalog.remove_adapter("poet")
    assert catalog.remove_model("base").manifest == BASE
    assert catalog.models() == []
    with pytest.raises(NotFound):
        catalog.remove_model("base")


def test_a_models_files_go_after_its_last_name(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_base(catalog, home, "alias")
    for name in ("base", "alias"):
        assert catalog.remove_unreferenced() == []
        catalog.remove_model(name)
        assert home.model_directory(BASE.digest).exists()
    assert catalog.remove_unreferenced() == [home.model_directory(BASE.digest)]
    assert not list(home.models.iterdir())
    assert not list(home.temporary.iterdir())


def test_nothing_is_registered_without_its_files(catalog: Catalog, home: Home) -> None:
    with pytest.raises(Conflict, match="import them again"):
        catalog.add_model("base", BASE)
    add_base(catalog, home)
    with pytest.raises(Conflict, match="import them again"):
        catalog.register_adapter("poet", "base", version("1"), "")
    assert catalog.adapters() == []


def test_files_that_never_got_a_name_are_deleted(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    add_adapter(catalog, home, "poet", version("1"))
    stray = [home.model_directory(OTHER_BASE.digest), home.adapter_directory(version("2").digest)]
    for directory in stray:
        directory.mkdir()
        (directory / "file").write_text("content")
    assert catalog.remove_unreferenced() == sorted(stray)
    assert not any(directory.exists() for directory in stray)
    assert catalog.adapter("poet").path.parent.exists()
    assert home.model_directory(BASE.digest).exists()


def test_nothing_is_deleted_from_under_a_server_that_still_runs_a_replaced_version(home: Home) -> None:
    with Catalog.open(home) as catalog:
        add_base(catalog, home)
        add_adapter(catalog, home, "poet", version("1"))
        replaced, removed = (home.adapter_directory(version(digit).digest) for digit in "12")
        with home.using():
            add_adapter(catalog, home, "poet", version("2"))
            catalog.remove_adapter("poet")
            with Catalog.open(Home(home.root)) as other:
                assert other.remove_unreferenced() == []
            assert replaced.exists()
            assert removed.exists()
        assert catalog.remove_unreferenced() == [replaced, removed]


def test_a_rejected_models_files_are_discarded_unless_a_name_has_them(catalog: Catalog, home: Home) -> None:
    add_base(catalog, home)
    assert not catalog.discard(home.model_directory(BASE.digest))
    home.model_directory(OTHER_BASE.digest).mkdir()
    assert catalog.discard(home.model_directory(OTHER_BASE.digest))
    assert not catalog.discard(home.model_directory(OTHER_BASE.digest))
    assert [path.name for path in home.models.iterdir()] == [BASE.digest]
