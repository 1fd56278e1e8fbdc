"""Supervision around the real engine: what comes after a kill is what would have come without it."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from rekindle.clock import SystemClock
from rekindle.errors import ConfigurationError, InvalidRequest
from rekindle.fleet.replica import Replica
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.units import MIB
from support.oracle import oracle_greedy
from support.replicas import QUICK, collect, engine_settings, request, tokens_of
from support.tiny import make_model

pytest.importorskip("transformers")


async def test_greedy_streams_of_the_real_engine_equal_the_oracle_across_a_kill(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "source")
    home = Home(tmp_path / "home")
    manifest = import_model(tmp_path / "source", home)
    model_dir = str(home.model_directory(manifest.digest))
    settings = engine_settings(model=manifest, model_dir=model_dir, memory_bytes=8 * MIB)
    replica = Replica(settings, SystemClock(), supervision=QUICK)
    ready = await replica.start()
    assert ready.max_context_tokens == 256
    assert [part for part, _ in ready.parts_s]
    with pytest.raises(InvalidRequest, match="outside the vocabulary") as met:
        await collect(replica, request("bad", prompt=(100_000,)))
    assert met.value.field == "prompt"
    wanted = [request(f"r{i}", 60, (3 + i, 4, 5), temperature=0.0) for i in range(3)]
    streams = [replica.generate(each) for each in wanted]
    received = [[await anext(stream)] for stream in streams]
    assert replica.engine_pid is not None
    os.kill(replica.engine_pid, signal.SIGKILL)
    for each, stream, chunks in zip(wanted, streams, received, strict=True):
        chunks += [chunk async for chunk in stream]
        expected = await asyncio.to_thread(oracle_greedy, model, list(each.prompt_token_ids), 60)
        assert list(tokens_of(chunks)) == expected
    assert replica.restarts_total == 1
    await replica.stop()


async def test_the_real_engine_names_the_setting_it_cannot_start_with() -> None:
    replica = Replica(engine_settings(dtype="int3"), SystemClock(), supervision=QUICK)
    with pytest.raises(ConfigurationError, match="int3"):
        await replica.start()
