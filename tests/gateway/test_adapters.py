"""Adapters registered, replaced and removed while requests run on them."""

from __future__ import annotations

import threading

import httpx
import openai
import pytest

from rekindle.errors import AdapterRejected, ConfigurationError, ReplicaUnavailable
from rekindle.gateway.adapter_versions import AdapterVersions

BASE = "org/tiny:v1"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def register(server):
    def register(name: str, source: object, **fields: object) -> httpx.Response:
        body = {"name": name, "source": str(source), **fields}
        return httpx.post(f"{server.url}/v1/adapters", json=body, timeout=20)

    return register


def test_a_registered_adapter_answers_under_its_name_and_under_its_base(server, client, register):
    response = register("pirate", server.write_adapter("pirate one"))
    assert response.status_code == 201
    version = response.json()["version"]
    for name in ("pirate", f"{BASE}:pirate"):
        reply = client.chat.completions.create(model=name, messages=HELLO)
        assert reply.model == name
        assert reply.system_fingerprint == f"fp_ba5eba5e_{version[:8]}"
        assert server.replica.requests[-1].adapter == version


def test_an_adapter_tells_what_it_is(server, register):
    created = register("poet/one:v2", server.write_adapter("poet")).json()
    shown = httpx.get(f"{server.url}/v1/adapters/poet/one:v2").json()
    assert shown == created
    assert shown["base_model"] == BASE
    assert shown["ranks"] == [8]
    assert shown["targets"] == ["q_proj"]
    assert shown["bytes"] == 512
    assert shown["bound_tensors"] == 2
    assert shown["residency"] == "disk"
    assert shown["created"] == 1_700_000_000


def test_the_same_name_again_is_a_new_version_and_the_same_bytes_are_not(server, client, register):
    first = register("swap", server.write_adapter("swap one"))
    second = register("swap", server.write_adapter("swap two"))
    third = register("swap", server.write_adapter("swap two"))
    assert [first.status_code, second.status_code, third.status_code] == [201, 200, 200]
    assert second.json()["version"] == third.json()["version"] != first.json()["version"]
    client.chat.completions.create(model="swap", messages=HELLO)
    assert server.replica.requests[-1].adapter == second.json()["version"]
    assert server.replica.adapters.keys() >= {second.json()["version"]}
    assert first.json()["version"] not in server.replica.adapters


def start_held_stream(server, client, model: str):
    """A stream that waits after two tokens, and a thread that reads it to its end."""
    server.replica.hold_after = 2
    stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
    read: list[str] = []
    thread = threading.Thread(target=lambda: read.extend(c.choices[0].delta.content or "" for c in stream))
    thread.start()
    return thread, read


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_running_stream_finishes_on_its_version(server, client, register, eventually, change):
    old = register(f"busy-{change}", server.write_adapter(f"busy {change} one")).json()["version"]
    thread, read = start_held_stream(server, client, f"busy-{change}")
    eventually(lambda: len(server.replica.active) == 1, "the stream runs")
    if change == "replaced":
        new = register(f"busy-{change}", server.write_adapter(f"busy {change} two")).json()["version"]
        shown = httpx.get(f"{server.url}/v1/adapters/busy-{change}").json()
        assert shown["version"] == new
        assert shown["running_requests"] == 0
    else:
        deleted = httpx.delete(f"{server.url}/v1/adapters/busy-{change}").json()
        assert deleted == {"id": f"busy-{change}", "object": "adapter", "deleted": True}
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=f"busy-{change}", messages=HELLO)
    assert old in server.replica.adapters
    server.replica.release()
    thread.join()
    assert "".join(read) == "the quick brown fox"
    eventually(lambda: old in server.replica.removed, "the replica is told to forget the old version")


def test_new_requests_get_the_new_version_while_old_ones_run(server, client, register, eventually):
    register("both", server.write_adapter("both one"))
    thread, _ = start_held_stream(server, client, "both")
    eventually(lambda: len(server.replica.active) == 1, "the stream runs")
    new = register("both", server.write_adapter("both two")).json()["version"]
    server.replica.hold_after = None
    client.chat.completions.create(model="both", messages=HELLO)
    assert server.replica.requests[-1].adapter == new
    server.replica.release()
    thread.join()


async def test_a_version_that_loses_its_name_before_its_request_begins_is_forgotten_with_it(make_services, tmp_path):
    services = make_services()
    base, replica = services.bases[0], services.bases[0].replica
    (tmp_path / "adapter.txt").write_text("replaced at once")
    manifest, path = services.import_adapter(tmp_path, base.manifest)
    adapter = services.catalog.register_adapter("swapped", base.name, manifest, tmp_path)
    versions = AdapterVersions(services.catalog)
    services.catalog.remove_adapter("swapped")
    await versions.retire_unless_named(manifest)
    async with versions.lease(base, adapter):
        assert replica.adapters == {manifest.digest: path}
    assert replica.adapters == {}
    services.catalog.register_adapter("swapped", base.name, manifest, tmp_path)
    async with versions.lease(base, adapter):
        pass
    assert replica.adapters == {manifest.digest: path}


def test_a_version_with_two_names_outlives_one_of_them(server, client, register):
    version = register("one-name", server.write_adapter("shared")).json()["version"]
    register("other-name", server.write_adapter("shared"))
    httpx.delete(f"{server.url}/v1/adapters/one-name")
    assert version not in server.replica.removed
    client.chat.completions.create(model="other-name", messages=HELLO)
    httpx.delete(f"{server.url}/v1/adapters/other-name")
    assert version in server.replica.removed


def test_an_adapter_that_only_the_catalog_knows_is_made_known_by_its_first_request(server, client):
    digest = server.add_adapter("from-before", "registered before this server started")
    assert digest not in server.replica.adapters
    client.chat.completions.create(model="from-before", messages=HELLO)
    assert digest in server.replica.adapters


def test_an_adapter_with_a_hostile_chat_template_spoils_its_own_requests_only(server, client, register):
    source = server.write_adapter("with hostile template", "hostile-template")
    (source / "chat_template.jinja").write_text("{{ 9**(9**7*4) > 1 }}")
    register("hostile", source)
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(model="hostile", messages=HELLO)
    assert client.chat.completions.create(model=BASE, messages=HELLO).choices[0].message.content
    assert client.completions.create(model="hostile", prompt="x").choices[0].text


def test_an_adapters_own_chat_template_is_used_for_it(server, client, register):
    source = server.write_adapter("with template", "with-template")
    (source / "chat_template.jinja").write_text("ONLY {{ messages[0].content }}")
    register("templated", source)
    client.chat.completions.create(model="templated", messages=HELLO)
    assert server.replica.tokenizer.decode(server.replica.requests[-1].prompt_token_ids) == "ONLY hello"
    client.chat.completions.create(model=BASE, messages=HELLO)
    assert "assistant" in server.replica.tokenizer.decode(server.replica.requests[-1].prompt_token_ids)


def test_adapters_are_listed_by_name_and_page_by_page(server):
    for name in ("c", "a", "b"):
        server.add_adapter(name, f"listed {name}")
    first = httpx.get(f"{server.url}/v1/adapters?limit=2").json()
    assert [adapter["id"] for adapter in first["data"]] == ["a", "b"]
    assert (first["first_id"], first["last_id"], first["has_more"]) == ("a", "b", True)
    rest = httpx.get(f"{server.url}/v1/adapters", params={"after": first["last_id"]}).json()
    assert [adapter["id"] for adapter in rest["data"]] == ["c"]
    assert rest["has_more"] is False


def refusal(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    return response.json()["error"]


@pytest.mark.parametrize("name", ["", " x", "x" * 257, "a\n", "a\0"])
def test_a_name_that_cannot_be_used_is_refused(server, register, name):
    assert refusal(register(name, server.write_adapter("named")), 400)["param"] == "name"


def test_a_source_outside_the_allowed_directories_is_refused(server, register, tmp_path):
    (tmp_path / "adapter.txt").write_text("outside")
    link = server.adapter_root / "link"
    if not link.is_symlink():
        link.symlink_to(tmp_path)
    for source in (tmp_path, link, server.adapter_root / ".." / ".." / "x", "/etc", "relative", "\0", "x" * 5000):
        error = refusal(register("outside", source), 400)
        assert error["param"] == "source"
    assert server.catalog.by_name == {}


def test_a_file_that_is_a_link_out_of_the_allowed_directories_is_not_read(server, register, tmp_path):
    source = server.write_adapter("linked", "linked")
    (tmp_path / "secret").write_text("a secret")
    (source / "chat_template.jinja").symlink_to(tmp_path / "secret")
    error = refusal(register("linked", source), 400)
    assert (error["param"], error["code"]) == ("source", "source_not_allowed")
    assert "chat_template.jinja" in error["message"]
    assert server.catalog.by_name == {}


def test_a_source_that_is_no_directory_or_no_adapter_is_refused(server, register):
    assert refusal(register("none", server.adapter_root / "missing"), 400)["param"] == "source"
    empty = server.adapter_root / "empty"
    empty.mkdir(exist_ok=True)
    error = refusal(register("none", empty), 400)
    assert error["code"] == "adapter_rejected"
    assert "adapter_model.safetensors is missing" in error["message"]
    assert server.catalog.by_name == {}


def test_the_base_of_an_adapter_is_checked(server, register):
    source = server.write_adapter("based")
    assert refusal(register("based", source, base_model="nobody"), 404)["param"] == "base_model"
    assert register("based", source, base_model=BASE).status_code == 201
    assert refusal(register(BASE, source), 409)["param"] == "name"


@pytest.mark.parametrize(
    ("where", "error", "status"),
    [
        ("replica", ReplicaUnavailable("the engine is starting", retry_after_s=1), 503),
        ("replica", AdapterRejected("it is larger than the whole pool"), 400),
        ("catalog", ConfigurationError("the disk is full"), 500),
    ],
)
def test_a_registration_that_fails_leaves_nothing_behind(server, client, register, where, error, status):
    version = register("kept", server.write_adapter("kept one")).json()["version"]
    if where == "replica":
        server.replica.adapter_refusal = error
    else:
        server.catalog.refusal = error
    assert refusal(register("kept", server.write_adapter(f"kept two {where} {status}")), status)["message"] == str(
        error
    )
    assert refusal(register("new", server.write_adapter(f"new {where} {status}")), status)
    server.replica.adapter_refusal = server.catalog.refusal = None
    assert list(server.catalog.by_name) == ["kept"]
    assert httpx.get(f"{server.url}/v1/adapters/kept").json()["version"] == version
    client.chat.completions.create(model="kept", messages=HELLO)


def test_registrations_of_one_name_happen_one_after_the_other(server, register):
    sources = [server.write_adapter(f"racer {number}") for number in range(8)]
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda source=source: statuses.append(register("racer", source).status_code))
        for source in sources
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] * 7 + [201]
    known = [digest for digest in server.replica.adapters if digest == server.catalog.by_name["racer"].manifest.digest]
    assert len(known) == 1
    assert len([p for p in server.replica.adapters.values() if p.read_text().startswith("racer")]) == 1


def test_unknown_adapters_are_not_found(server):
    assert refusal(httpx.get(f"{server.url}/v1/adapters/nobody"), 404)["code"] == "adapter_not_found"
    assert refusal(httpx.delete(f"{server.url}/v1/adapters/nobody"), 404)["code"] == "adapter_not_found"


def test_a_server_with_no_allowed_directory_takes_no_adapters(start_server, tmp_path):
    (tmp_path / "adapter.txt").write_text("x")
    with start_server(adapter_roots=()) as server:
        response = httpx.post(f"{server.url}/v1/adapters", json={"name": "x", "source": str(tmp_path)})
    assert refusal(response, 400)["code"] == "source_not_allowed"
