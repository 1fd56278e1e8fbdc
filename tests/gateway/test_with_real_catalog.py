"""Adapters through the real catalog and the real importer: what is registered outlives the server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from rekindle.catalog.catalog import Catalog
from rekindle.gateway.app import create_app
from rekindle.protocol.adapters import ADAPTER_FILE_NAME
from rekindle.protocol.models import ModelManifest, ModuleShape
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home

BASE_NAME = "org/tiny:v1"
MODULE = "model.layers.0.self_attn.q_proj"


def write_peft_adapter(directory: Path, *, rank: int, seed: int) -> Path:
    directory.mkdir()
    random = np.random.default_rng(seed)
    save_file(
        {
            f"base_model.model.{MODULE}.lora_A.weight": random.standard_normal((rank, 16)).astype(np.float32),
            f"base_model.model.{MODULE}.lora_B.weight": random.standard_normal((16, rank)).astype(np.float32),
        },
        directory / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def make_app(make_services, home):
    """An application over one home directory, as often as wanted; and its replica."""

    def make(catalog: Catalog):
        services = make_services()
        base = services.bases[0]
        modules = (ModuleShape(MODULE, "linear", 16, 16),)
        manifest: ModelManifest = replace(base.manifest, modules=modules, num_layers=1)
        home.model_directory(manifest.digest).mkdir(exist_ok=True)
        catalog.add_model(BASE_NAME, manifest)

        def bring_in(source: Path, model: ModelManifest):
            adapter = import_adapter(source, model, home.model_directory(model.digest), home)
            return adapter, home.adapter_directory(adapter.digest) / ADAPTER_FILE_NAME

        bases = (replace(base, manifest=manifest),)
        return (
            create_app(replace(services, bases=bases, catalog=catalog, import_adapter=bring_in)),
            base.replica,
            (services.settings.adapter_roots[0]),
        )

    return make


def talk_to(app) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def complete(client: httpx.AsyncClient, model: str) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": model, "prompt": "hello"})


async def test_an_adapter_is_registered_replaced_and_removed_in_the_real_catalog(make_app, home):
    with Catalog.open(home) as catalog:
        app, replica, root = make_app(catalog)
        async with talk_to(app) as client:
            first_source = await asyncio.to_thread(write_peft_adapter, root / "one", rank=4, seed=1)
            second_source = await asyncio.to_thread(write_peft_adapter, root / "two", rank=8, seed=2)
            first = await client.post("/v1/adapters", json={"name": "team/x:1", "source": str(first_source)})
            assert first.status_code == 201, first.text
            assert first.json()["ranks"] == [4]
            assert first.json()["bytes"] == 2 * 4 * 16 * 4
            second = await client.post("/v1/adapters", json={"name": "team/x:1", "source": str(second_source)})
            assert (second.status_code, second.json()["ranks"]) == (200, [8])
            assert (await complete(client, f"{BASE_NAME}:team/x:1")).status_code == 200
            assert replica.requests[-1].adapter == second.json()["version"]
            assert list(replica.adapters) == [second.json()["version"]]
            assert (await client.delete("/v1/adapters/team/x:1")).json()["deleted"] is True
            assert (await complete(client, "team/x:1")).json()["error"]["code"] == "model_not_found"
            assert replica.adapters == {}


async def test_a_registered_adapter_answers_after_a_restart(make_app, home):
    with Catalog.open(home) as catalog:
        app, _, root = make_app(catalog)
        source = await asyncio.to_thread(write_peft_adapter, root / "kept", rank=2, seed=3)
        async with talk_to(app) as client:
            body = {"name": "kept", "source": str(source)}
            version = (await client.post("/v1/adapters", json=body)).json()["version"]
    with Catalog.open(home) as catalog:
        app, replica, _ = make_app(catalog)
        async with talk_to(app) as client:
            assert (await complete(client, "kept")).status_code == 200
            assert replica.requests[-1].adapter == version
            assert replica.adapters[version].is_file()


async def test_a_damaged_adapter_is_refused_with_its_reason_and_nothing_is_registered(make_app, home):
    with Catalog.open(home) as catalog:
        app, replica, root = make_app(catalog)
        source = await asyncio.to_thread(write_peft_adapter, root / "damaged", rank=2, seed=4)
        tensors = source / "adapter_model.safetensors"
        await asyncio.to_thread(tensors.write_bytes, tensors.read_bytes()[:-8])
        async with talk_to(app) as client:
            response = await client.post("/v1/adapters", json={"name": "damaged", "source": str(source)})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "adapter_rejected"
        assert catalog.adapters() == []
        assert replica.adapters == {}
