"""Models, readiness and metrics."""

from __future__ import annotations

from dataclasses import asdict

import httpx
import openai
import pytest
from openai.types import Model
from prometheus_client.parser import text_string_to_metric_families

from rekindle.protocol.tiers import Resident, Snapshot

BASE = "org/tiny:v1"
HELLO = [{"role": "user", "content": "hello"}]


def test_models_list_bases_and_adapters_with_their_lineage(server, client):
    server.add_adapter("team/poet:v2", "lineage")
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {BASE, "team/poet:v2"}
    assert models[BASE].parent is None
    assert models[BASE].max_model_len == 512
    assert models["team/poet:v2"].parent == BASE
    assert models["team/poet:v2"].owned_by == "rekindle"


def test_a_model_of_two_names_answers_to_both_and_its_adapters_run_under_either(start_server):
    with start_server(other_names=("second",)) as server, server.client() as client:
        assert {model.id for model in client.models.list()} == {BASE, "second"}
        source = str(server.write_adapter("two names"))
        for base in (BASE, "second"):
            body = {"name": f"poet-of-{base}", "source": source, "base_model": base}
            registered = httpx.post(f"{server.url}/v1/adapters", json=body)
            assert (registered.status_code, registered.json()["base_model"]) == (201, base)
        for model in (BASE, "second", f"poet-of-{BASE}", "poet-of-second", "second:poet-of-second"):
            assert client.chat.completions.create(model=model, messages=HELLO).choices[0].message.content


@pytest.mark.parametrize("name", [BASE, "team/poet:v2", f"{BASE}:team/poet:v2"])
def test_a_model_is_retrieved_by_a_name_with_slashes_and_colons(server, client, name):
    server.add_adapter("team/poet:v2", "lineage")
    raw = client.models.with_raw_response.retrieve(name)
    assert Model.model_validate_json(raw.text, strict=True).id == name


def test_an_unknown_model_is_not_retrieved(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such:model")
    assert caught.value.code == "model_not_found"


def test_readiness_follows_the_engines_and_liveness_does_not(server):
    assert httpx.get(f"{server.url}/ready").json() == {"status": "ready", "models": {BASE: True}}
    server.replica.is_ready = False
    try:
        response = httpx.get(f"{server.url}/ready")
        assert response.status_code == 503
        assert response.json()["models"] == {BASE: False}
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        server.replica.is_ready = True


def scrape(server) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(samples, name: str, **labels: str) -> float:
    return samples.get((name, tuple(sorted({"model_name": BASE, **labels}.items()))), 0.0)


def test_the_engines_figures_are_shown_under_vllms_names(server):
    samples = scrape(server)
    assert value(samples, "vllm:num_requests_running") == 3
    assert value(samples, "vllm:num_requests_waiting") == 2
    assert value(samples, "vllm:kv_cache_usage_perc") == 0.25
    assert value(samples, "vllm:prefix_cache_queries_total") == 70
    assert value(samples, "vllm:prefix_cache_hits_total") == 30
    assert value(samples, "vllm:num_preemptions_total") == 5
    assert value(samples, "rekindle_pages", kind="adapter") == 20
    assert value(samples, "rekindle_pages", kind="free") == 40
    assert value(samples, "rekindle_merged_adapter", version="merged-version") == 1
    assert value(samples, "rekindle_steps_merged_total") == 4
    assert value(samples, "rekindle_engine_ready") == 1
    assert value(samples, "rekindle_engine_awake") == 1
    assert value(samples, "rekindle_engine_restarts_total") == 2
    assert value(samples, "rekindle_engine_wakes_total") == 3
    assert value(samples, "rekindle_engine_start_seconds", part="weights") == 0.5


async def _host_memory() -> Snapshot:
    objects = (Resident("weights", 100, 100, 2, 0.0), Resident("others", 45, 30, 0, 5.0, True, ("worth it",)))
    return Snapshot(64, 30, objects, 7, 8, 9)


def test_host_memory_is_shown(server, start_server):
    assert httpx.get(f"{server.url}/v1/store").json()["host_memory"] is None
    with start_server(host_memory=_host_memory) as other:
        samples = scrape(other)
        kinds = {"in_use": 100, "idle": 30, "idle_budget": 64}
        assert {kind: samples["rekindle_host_memory_bytes", (("kind", kind),)] for kind in kinds} == kinds
        assert samples["rekindle_host_memory_hits_total", ()] == 7
        assert samples["rekindle_host_memory_misses_total", ()] == 8
        assert samples["rekindle_host_memory_evictions_total", ()] == 9
        shown = httpx.get(f"{other.url}/v1/store").json()
        assert shown["models"] == [
            {
                "id": BASE,
                "digest": "ba5e" * 16,
                "is_awake": True,
                "wakes_total": 3,
                "start_s": {"process": 0.25, "weights": 0.5},
                "estimates": [
                    {
                        "stage": "disk->device",
                        "fixed_s": 0.5,
                        "bytes_per_s": 1e9,
                        "num_observations": 12,
                        "error": 0.0625,
                    },
                    {
                        "stage": "start:process",
                        "fixed_s": 0.25,
                        "bytes_per_s": None,
                        "num_observations": 1,
                        "error": 0.75,
                    },
                ],
                "resident_adapters": [],
            }
        ]
        other_object = shown["host_memory"]["objects"][1]
        assert (other_object["num_bytes"], other_object["kept_bytes"], other_object["is_packed"]) == (45, 30, True)
        assert other_object["reasons"] == ["worth it"]
        assert (shown["storage"]["num_threads"], shown["storage"]["direct_bytes_s"]) == (4, None)


def test_the_engines_memory_loads_and_refusals_are_shown(server):
    samples = scrape(server)
    stats = server.replica.stats
    for kind, num_bytes in asdict(stats.pool_bytes).items():
        assert value(samples, "rekindle_pool_bytes", kind=kind) == num_bytes
    assert value(samples, "rekindle_adapter_loads_under_way") == stats.num_adapter_loads
    assert value(samples, "rekindle_adapter_load_seconds_total") == stats.adapter_load_s_total
    assert value(samples, "rekindle_adapter_queued_seconds_total") == stats.adapter_queued_s_total
    assert value(samples, "rekindle_adapter_evictions_total") == stats.adapter_evictions_total
    assert value(samples, "rekindle_prefix_evictions_total") == stats.prefix_evictions_total
    assert value(samples, "rekindle_refused_late_total") == stats.refused_late_total
    assert value(samples, "rekindle_refused_queue_full_total") == stats.refused_full_total


def test_how_long_loads_are_likely_to_take_is_shown_by_stage(server):
    samples = scrape(server)

    def shown(name: str) -> dict[str, float]:
        found = {dict(labels).get("stage"): it for (sample, labels), it in samples.items() if sample == name}
        return {str(stage): it for stage, it in found.items()}

    assert shown("rekindle_load_estimate_fixed_seconds") == {"disk->device": 0.5, "start:process": 0.25}
    assert shown("rekindle_load_estimate_bytes_per_second") == {"disk->device": 1e9}
    assert shown("rekindle_load_estimate_error_ratio") == {"disk->device": 0.0625, "start:process": 0.75}
    assert shown("rekindle_load_estimate_observations_total") == {"disk->device": 12, "start:process": 1}


def test_requests_tokens_and_times_are_counted(server, client):
    before = scrape(server)
    reply = client.chat.completions.create(model=BASE, messages=HELLO, n=2)
    after = scrape(server)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("vllm:prompt_tokens_total") == reply.usage.prompt_tokens
    assert grown("vllm:generation_tokens_total") == reply.usage.completion_tokens
    assert grown("vllm:request_success_total", finished_reason="stop") == 2
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == reply.usage.completion_tokens - 2


def test_adapters_of_running_requests_are_named(server, client, eventually):
    server.add_adapter("shown", "shown in metrics")
    server.replica.hold_after = 1

    def running() -> str:
        labels = [dict(labels) for name, labels in scrape(server) if name == "vllm:lora_requests_info"]
        return labels[0]["running_lora_adapters"]

    assert running() == ""
    with client.chat.completions.create(model="shown", messages=HELLO, stream=True) as stream:
        next(iter(stream))
        assert running() == "shown"
    eventually(lambda: running() == "", "the adapter's request is over")


def test_a_server_whose_engine_has_not_reported_yet_still_answers(start_server):
    with start_server() as server:
        server.replica.stats, server.replica.ready, server.replica.is_ready = None, None, False
        samples = scrape(server)
        assert value(samples, "rekindle_engine_ready") == 0
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 512


def test_the_api_describes_itself(server):
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]
