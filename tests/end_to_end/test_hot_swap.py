"""One adapter's name changes its version again and again under hundreds of streams: through the real server."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI

from support.oracle import random_prompts
from support.server import Server, rekindle, start, stop
from support.tiny import make_tokenizer
from support.tiny_home import TinyHome

pytest.importorskip("peft")

STREAMS_A_WAVE = 200
NUM_TOKENS = 24
VERSIONS = ("first", "second", "third", "fourth")
NAME = "changing"
PROMPTS = [random_prompts(seed=seed)[1] for seed in range(4)]
LONG_PROMPT = random_prompts(seed=9)[3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    tiny = TinyHome(tmp_path_factory.mktemp("hot-swap"))
    for version in VERSIONS:
        tiny.adapter(version)
    return tiny


@pytest.fixture(scope="module")
def tiny_server(tiny: TinyHome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("served")
    added = rekindle("models", "add", str(tiny.source), "--name", "tiny", home=home)
    assert added.returncode == 0, added.stderr
    root = tiny.source.parent
    settings = (f'server.adapter_roots=["{root}"]', 'engine.memory="80MiB"', 'engine.dtype="float32"')
    server = start(home, *settings, "engine.deterministic=true", "engine.threads=1")
    yield server
    assert stop(server) == 0


async def register(http: httpx.AsyncClient, source: Path) -> str:
    response = await http.post("/v1/adapters", json={"name": NAME, "source": str(source)})
    assert response.status_code in (200, 201), response.text
    return str(response.json()["version"])


async def stream_text(client: AsyncOpenAI, prompt: list[int]) -> str:
    events = await client.completions.create(
        model=NAME, prompt=prompt, max_tokens=NUM_TOKENS, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )  # fmt: skip
    return "".join([event.choices[0].text async for event in events])


@pytest.mark.parametrize("num_waves", [1, pytest.param(30, marks=pytest.mark.soak)])
async def test_every_stream_is_wholly_of_one_version_while_the_name_changes_hands(
    tiny: TinyHome, tiny_server: Server, num_waves: int
) -> None:
    tokenizer = make_tokenizer()
    draw = random.Random(0)
    version_of = {
        (
            prompt,
            tokenizer.decode(tiny.answer(version, PROMPTS[prompt], NUM_TOKENS), skip_special_tokens=False),
        ): version
        for prompt in range(len(PROMPTS))
        for version in VERSIONS
    }
    assert len(version_of) == len(PROMPTS) * len(VERSIONS)
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=tiny_server.url, timeout=60) as http,
        httpx.AsyncClient(timeout=60, limits=limits) as many,
        AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0, http_client=many) as client,
    ):
        await register(http, tiny.adapter(VERSIONS[0]).source)
        prompts = [draw.randrange(len(PROMPTS)) for _ in range(num_waves * STREAMS_A_WAVE)]

        room = asyncio.Semaphore(STREAMS_A_WAVE)

        async def later(prompt: int, delay_s: float) -> str:
            async with room:
                await asyncio.sleep(delay_s)
                return await stream_text(client, PROMPTS[prompt])

        streams = [asyncio.create_task(later(prompt, draw.random())) for prompt in prompts]
        num_changes = 0
        while not all(stream.done() for stream in streams):
            num_changes += 1
            await register(http, tiny.adapter(VERSIONS[num_changes % len(VERSIONS)]).source)
            await asyncio.sleep(draw.random() * 0.1)
        texts = await asyncio.gather(*streams)
    seen = Counter(version_of.get((prompt, text), text) for prompt, text in zip(prompts, texts, strict=True))
    assert set(seen) <= set(VERSIONS)
    assert len(seen) > 1
    assert num_changes >= len(VERSIONS)


async def test_a_version_never_meets_the_prefixes_of_the_one_before(tiny: TinyHome, tiny_server: Server) -> None:
    tokenizer = make_tokenizer()
    async with httpx.AsyncClient(base_url=tiny_server.url, timeout=60) as http:

        async def ask() -> tuple[str, int]:
            body = {
                "model": NAME, "prompt": LONG_PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True,
                "skip_special_tokens": False,
            }  # fmt: skip
            reply = (await http.post("/v1/completions", json=body)).json()
            details = reply["usage"]["prompt_tokens_details"]
            return reply["choices"][0]["text"], details["cached_tokens"]

        async def check(version: str, num_cached: int) -> None:
            await register(http, tiny.adapter(version).source)
            text = tokenizer.decode(tiny.answer(version, LONG_PROMPT, 6), skip_special_tokens=False)
            assert await ask() == (text, num_cached)

        num_whole = (len(LONG_PROMPT) - 1) // 16 * 16
        await check("first", 0)
        await check("first", num_whole)
        await check("second", 0)
        await check("second", num_whole)
        await check("third", 0)
