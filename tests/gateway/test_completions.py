"""/v1/completions through the official client."""

from __future__ import annotations

import threading

import httpx
import pytest
from openai.types import Completion

from rekindle.gateway import encoders
from rekindle.gateway.state import INLINE_BODY_BYTES

MODEL = "org/tiny:v1"
TEXT = " the quick brown fox"


@pytest.fixture(autouse=True)
def continuation(server):
    server.replica.say(TEXT)


def test_a_completion_is_answered_in_the_form_the_client_knows(client):
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="said", max_tokens=100)
    reply = Completion.model_validate_json(raw.text, strict=True)
    assert reply.choices[0].text == TEXT
    assert reply.choices[0].finish_reason == "stop"
    assert reply.object == "text_completion"
    assert reply.choices[0].logprobs is None


def test_sixteen_tokens_are_the_default(server, client):
    client.completions.create(model=MODEL, prompt="said")
    assert server.replica.requests[0].sampling.max_tokens == 16


@pytest.mark.parametrize("prompt", ["the dog", ["the dog"], [5, 6, 7], [[5, 6, 7]]])
def test_a_prompt_is_text_or_token_ids_alone_or_in_a_list(server, client, prompt):
    client.completions.create(model=MODEL, prompt=prompt)
    ids = server.replica.requests[0].prompt_token_ids
    assert ids == (tuple(server.replica.encode("the dog")) if "the dog" in prompt else (5, 6, 7))


def test_several_prompts_with_several_choices_are_numbered_prompt_by_prompt(server, client):
    server.replica.answer = lambda request: [*request.prompt_token_ids, 50 + request.sampling.seed % 7]
    reply = client.completions.create(model=MODEL, prompt=["the", "dog"], n=2, seed=3, max_tokens=50)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in reply.choices] == ["the", "the", "dog", "dog"]
    prompts = {request.prompt_token_ids for request in server.replica.requests}
    assert reply.usage.prompt_tokens == sum(len(prompt) for prompt in prompts)


def test_a_streamed_completion_spells_the_same_text(client):
    chunks = list(client.completions.create(model=MODEL, prompt="said", max_tokens=100, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}


def test_every_event_of_a_streamed_completion_can_be_validated(server):
    body = {"model": MODEL, "prompt": "said", "stream": True, "logprobs": 2, "max_tokens": 100}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    *events, done = [event.removeprefix("data: ") for event in response.text.removesuffix("\n\n").split("\n\n")]
    assert done == "[DONE]"
    for event in events:
        # The client's own record demands a finish reason even of unfinished events, as OpenAI's service does not.
        Completion.model_validate_json(event.replace('"finish_reason":null', '"finish_reason":"stop"'), strict=True)


def test_log_probabilities_are_four_lists_of_equal_length(server, client):
    logprobs = client.completions.create(model=MODEL, prompt="said", max_tokens=100, logprobs=2).choices[0].logprobs
    assert "".join(logprobs.tokens) == TEXT
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert [TEXT[at : at + len(token)] for at, token in zip(logprobs.text_offset, logprobs.tokens, strict=True)] == (
        logprobs.tokens
    )
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_log_probabilities_scores_the_prompt(server, client, stream):
    options = {"model": MODEL, "prompt": "the lazy dog", "echo": True, "logprobs": 1, "max_tokens": 3}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    else:
        choices = client.completions.create(**options).choices
    text = "".join(choice.text for choice in choices)
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert text.startswith("the lazy dog the")
    assert "".join(tokens) == text
    assert [text[at : at + len(token)] for at, token in zip(offsets, tokens, strict=True)] == tokens
    assert choices[0].logprobs.token_logprobs[0] is None
    assert choices[0].logprobs.top_logprobs[0] is None
    assert choices[0].logprobs.token_logprobs[1] == -0.5


@pytest.mark.parametrize("prompt", ["<|im_start|>user\nsaid the fox<|im_end|>", "größe 🙂 日本 naïve the dog"])
def test_offsets_in_an_echoed_prompt_count_its_own_characters(server, client, prompt):
    reply = client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=1, max_tokens=0).choices[0]
    found = [
        reply.text[at : at + len(token)]
        for at, token in zip(reply.logprobs.text_offset, reply.logprobs.tokens, strict=True)
        if not token.startswith("bytes:")
    ]
    assert reply.text == prompt
    assert found == [token for token in reply.logprobs.tokens if not token.startswith("bytes:")]


def test_a_prompt_can_be_scored_without_generating_anything(server, client):
    reply = client.completions.create(model=MODEL, prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=0)
    assert len(reply.choices[0].logprobs.tokens) == 3
    assert reply.usage.completion_tokens == 0


def test_an_echo_of_token_ids_is_their_text(server, client):
    ids = server.replica.encode("naïve 🙂")
    assert (
        client.completions.create(model=MODEL, prompt=ids, echo=True, max_tokens=1)
        .choices[0]
        .text.startswith("naïve 🙂")
    )


def test_parts_of_a_character_are_named_by_their_bytes(server, client):
    server.replica.say("🙃")
    logprobs = client.completions.create(model=MODEL, prompt="x", logprobs=0).choices[0].logprobs
    assert "bytes:\\xf0" in logprobs.tokens[0] + logprobs.tokens[1]


def test_best_of_is_accepted_where_it_asks_for_nothing_more(client):
    assert len(client.completions.create(model=MODEL, prompt="x", n=2, best_of=2).choices) == 2


def test_a_prompt_that_fills_the_context_may_still_be_scored(server, client):
    reply = client.completions.create(model=MODEL, prompt=[5] * 512, max_tokens=0, echo=True, logprobs=0)
    assert reply.usage.prompt_tokens == 512


def test_many_and_long_prompts_are_encoded_in_threads_of_their_own_and_keep_their_order(server, client):
    server.replica.answer = lambda request: request.prompt_token_ids
    prompts = [f"prompt number {number} " + "the quick brown fox " * 5 for number in range(200)]
    reply = client.completions.create(model=MODEL, prompt=prompts, max_tokens=200)
    assert [choice.text for choice in reply.choices] == prompts
    assert any(thread.name.startswith("text") for thread in threading.enumerate())


def test_what_is_said_of_a_prompt_is_encoded_once_for_all_its_choices(server, client, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr(encoders, "_ranked", lambda entry, _: calls.append(entry.token_id) or {})
    extra = {"prompt_logprobs": 0}
    reply = client.completions.create(model=MODEL, prompt=[5, 6, 7], n=4, max_tokens=1, extra_body=extra)
    assert [len(choice.prompt_logprobs) for choice in reply.choices] == [3] * 4
    assert calls == [6, 7]


def test_a_large_body_is_read_in_a_thread(server, client):
    reply = client.completions.create(model=MODEL, prompt="a", max_tokens=1, user="x" * (INLINE_BODY_BYTES + 1))
    assert reply.choices[0].text
