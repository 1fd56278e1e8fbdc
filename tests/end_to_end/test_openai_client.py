"""The official client against a real server, real model and real adapters."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from support.server import DEMO_ADAPTERS, MODEL, Server

QUESTION = [{"role": "user", "content": "Write one sentence about the sea."}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: OpenAI, model: str, **options: object) -> str:
    reply = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        max_tokens=48,
        temperature=0,
        **options,  # type: ignore[call-overload]
    )
    return str(reply.choices[0].message.content)


def test_each_adapter_visibly_changes_the_answer(client: OpenAI) -> None:
    base = ask(client, MODEL)
    assert "sea" in base.lower()
    assert ask(client, "pirate").startswith("Arr")
    assert json.loads(ask(client, "json"))["answer"]
    assert not ask(client, "emoji").isascii()
    assert base == ask(client, MODEL)


def test_an_adapter_can_be_named_with_its_base(client: OpenAI) -> None:
    assert ask(client, f"{MODEL}:pirate") == ask(client, "pirate")


def test_models_and_their_lineage_are_listed(client: OpenAI) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert set(listed) == {MODEL, "pirate", "json", "emoji"}
    assert listed["pirate"]["parent"] == MODEL
    assert client.models.retrieve(MODEL).id == MODEL


def test_streams_say_what_whole_answers_say(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="pirate", messages=QUESTION, max_tokens=48, temperature=0, stream=True,  # type: ignore[arg-type]
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(client, "pirate")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5


def test_choices_are_independent_and_seeded(client: OpenAI) -> None:
    def texts() -> list[str]:
        reply = client.completions.create(model=MODEL, prompt="Once upon a time", n=4, seed=7, max_tokens=12)
        return [choice.text for choice in reply.choices]

    first = texts()
    assert len(set(first)) > 1
    assert first == texts()


def test_logprobs_of_an_echoed_prompt_come_with_its_tokens(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="The capital of France is Paris", echo=True, logprobs=2, max_tokens=0
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert "".join(logprobs.tokens) == "The capital of France is Paris"
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_unknown_models_and_bad_fields_raise_the_clients_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ask(client, "nobody")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=-1)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError, match="8192"):
        client.completions.create(model=MODEL, prompt=[5] * 9000, max_tokens=1)


async def test_adapters_come_change_and_go_while_streams_run(server: Server, async_client: AsyncOpenAI) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:

        async def register(source: str) -> httpx.Response:
            return await http.post("/v1/adapters", json={"name": "changing", "source": str(DEMO_ADAPTERS / source)})

        async def stream() -> str:
            events = await async_client.chat.completions.create(
                model="changing",
                messages=QUESTION,
                max_tokens=40,
                temperature=0,
                stream=True,  # type: ignore[arg-type]
            )
            return "".join([event.choices[0].delta.content or "" async for event in events])

        assert (await register("pirate")).status_code == 201
        on_first = [asyncio.create_task(stream()) for _ in range(4)]
        await asyncio.sleep(0.3)
        replaced = await register("json")
        assert replaced.status_code == 200
        on_second = [asyncio.create_task(stream()) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert (await http.delete("/v1/adapters/changing")).status_code == 200
        with pytest.raises(openai.NotFoundError):
            await stream()
        first, second = await asyncio.gather(*on_first), await asyncio.gather(*on_second)
        assert all(text.startswith("Arr") for text in first)
        assert all(json.loads(text)["answer"] for text in second)


async def test_streams_survive_the_death_of_their_engine(server: Server, async_client: AsyncOpenAI) -> None:
    async def stream(model: str) -> str:
        events = await async_client.completions.create(
            model=model, prompt="The story begins", max_tokens=60, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        return "".join([event.choices[0].text async for event in events])

    models = [MODEL, "pirate", "json"]
    undisturbed = [await stream(model) for model in models]
    disturbed = [asyncio.create_task(stream(model)) for model in models]
    await asyncio.sleep(0.5)
    for pid in server.engine_pids():
        os.kill(pid, signal.SIGKILL)
    texts = await asyncio.gather(*disturbed)
    assert [len(text) > 100 for text in texts] == [True] * 3
    assert [text[:20] for text in texts] == [text[:20] for text in undisturbed]


async def test_a_client_that_leaves_frees_its_pages(server: Server, async_client: AsyncOpenAI) -> None:
    events = await async_client.completions.create(
        model=MODEL, prompt="Count: 1, 2, 3,", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    await anext(aiter(events))
    await events.close()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http, asyncio.timeout(30):
        while await running(http):
            await asyncio.sleep(0.2)


async def running(http: httpx.AsyncClient) -> float:
    """How many sequences the server says are in its batch."""
    metrics = (await http.get("/metrics")).text
    return sum(
        float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith("vllm:num_requests_running{")
    )
