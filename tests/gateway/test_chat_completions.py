"""/v1/chat/completions through the official client."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

MODEL = "org/tiny:v1"
HELLO = [{"role": "user", "content": "hello"}]


def test_a_chat_is_answered_in_the_form_the_client_knows(server, client):
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    reply = ChatCompletion.model_validate_json(raw.text, strict=True)
    assert reply.choices[0].message.content == "the quick brown fox"
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.model == MODEL
    assert reply.id.startswith("chatcmpl-")
    assert reply.system_fingerprint == "fp_ba5eba5e"
    assert raw.headers["x-request-id"]


def test_the_prompt_is_what_the_chat_template_makes_of_the_messages(server, client):
    client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
        ],
    )
    prompt = server.replica.tokenizer.decode(server.replica.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_message_can_be_continued(server, client):
    client.chat.completions.create(
        model=MODEL,
        messages=[*HELLO, {"role": "assistant", "content": "the quick "}],
        extra_body={"continue_final_message": True},
    )
    prompt = server.replica.tokenizer.decode(server.replica.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nthe quick ")


def test_usage_counts_prompt_completion_and_cached_tokens(server, client):
    server.replica.cached_tokens = 4
    reply = client.chat.completions.create(model=MODEL, messages=HELLO)
    request = server.replica.requests[0]
    assert reply.usage.prompt_tokens == len(request.prompt_token_ids)
    assert reply.usage.completion_tokens == len(server.replica.encode("the quick brown fox")) + 1
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens == 4


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_a_stream_spells_the_same_text_as_the_whole_reply(server, client, chunk_tokens):
    server.replica.say("naïve 🙂 größe 日本")
    server.replica.chunk_tokens = chunk_tokens
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "naïve 🙂 größe 日本"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def events_of(response: httpx.Response) -> list[str]:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    return [event.removeprefix("data: ") for event in response.text.removesuffix("\n\n").split("\n\n")]


def test_every_event_of_a_stream_is_a_strict_chunk_and_the_last_is_done(server):
    body = {
        "model": MODEL,
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "top_logprobs": 2,
    }
    *events, done = events_of(httpx.post(f"{server.url}/v1/chat/completions", json=body))
    assert done == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(event, strict=True) for event in events]
    assert all(json.loads(event)["usage"] is None for event in events[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(server.replica.encode("the quick brown fox")) + 1


def test_without_include_usage_no_event_speaks_of_usage(server):
    body = {"model": MODEL, "messages": HELLO, "stream": True}
    *events, _ = events_of(httpx.post(f"{server.url}/v1/chat/completions", json=body))
    assert all("usage" not in json.loads(event) for event in events)
    assert all(json.loads(event)["choices"] for event in events)


async def test_the_asynchronous_client_streams_too(server):
    async with server.async_client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "the quick brown fox"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_give_each_token_its_bytes_and_alternatives(server, client, stream):
    server.replica.say("🙂 ok")
    options = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = client.chat.completions.create(**options, stream=True)
        content = [entry for chunk in chunks if (part := chunk.choices[0].logprobs) for entry in part.content]
    else:
        content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert bytes(value for entry in content for value in entry.bytes).decode() == "🙂 ok"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 3 for entry in content)
    assert content[0].top_logprobs[0].token == content[0].token


def test_log_probabilities_without_alternatives_have_an_empty_list_of_them(server, client):
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True)
    assert {len(entry.top_logprobs) for entry in reply.choices[0].logprobs.content} == {0}
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].logprobs is None


def test_n_choices_have_seeds_of_their_own_and_count_the_prompt_once(server, client):
    server.replica.answer = lambda request: server.replica.encode(f"answer {request.sampling.seed % 1000}")
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, n=4, seed=7)
    seeds = {r.request_id: r.sampling.seed for r in server.replica.requests}
    assert len(set(seeds.values())) == 4
    assert 7 in seeds.values()
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].message.content == "answer 7"
    assert reply.usage.prompt_tokens == len(server.replica.requests[0].prompt_token_ids)
    again = client.chat.completions.create(model=MODEL, messages=HELLO, n=4, seed=7)
    assert [c.message.content for c in again.choices] == [c.message.content for c in reply.choices]


def test_n_choices_share_one_stream(server, client):
    server.replica.answer = lambda request: server.replica.encode(f"answer {request.sampling.seed % 1000}")
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=1)
    texts, finished = ["", "", ""], []
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, n=3, seed=1, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        finished += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(finished) == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("stop", "text"), [("brown f", "the quick "), (["zebra", "ick"], "the qu"), ("dog", None)])
def test_a_stop_string_ends_the_text_even_across_tokens(server, client, stream, stop, text):
    options = {"model": MODEL, "messages": HELLO, "stop": stop}
    if stream:
        chunks = list(client.chat.completions.create(**options, stream=True))
        got = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        got = client.chat.completions.create(**options).choices[0].message.content
    assert got == (text or "the quick brown fox")


def test_a_stop_string_aborts_the_sequence_and_may_stay_in_the_text(server, client):
    reply = client.chat.completions.create(
        model=MODEL, messages=HELLO, stop="quick", extra_body={"include_stop_str_in_output": True}
    )
    assert reply.choices[0].message.content == "the quick"
    assert len(server.replica.aborted) == 1
    assert reply.usage.completion_tokens == len(server.replica.encode("the quick"))


def test_stop_strings_wait_for_min_tokens(server, client):
    reply = client.chat.completions.create(
        model=MODEL, messages=HELLO, stop="the", extra_body={"min_tokens": len(server.replica.encode("the quick"))}
    )
    assert reply.choices[0].message.content == "the quick brown fox"


def test_length_is_the_reason_when_max_tokens_ends_the_text(server, client):
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=2)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage.completion_tokens == 2
    assert server.replica.requests[0].sampling.max_tokens == 2


def test_what_a_request_leaves_out_comes_from_the_model_and_the_rest_of_the_context(server, client):
    client.chat.completions.create(model=MODEL, messages=HELLO)
    request = server.replica.requests[0]
    assert request.sampling.top_p == 0.9
    assert request.sampling.temperature == 1.0
    assert request.sampling.max_tokens == 512 - len(request.prompt_token_ids)
    assert request.sampling.stop_token_ids == (server.replica.tokenizer.token_to_id("<|im_end|>"),)


def test_every_sampling_field_reaches_the_replica(server, client):
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0.5,
        top_p=0.75,
        seed=11,
        max_tokens=9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": 3, "7": -100},
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "min_tokens": 3,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "cache_salt": "tenant",
            "priority": -2,
            "ttft_slo_ms": 2500,
            "prompt_logprobs": 1,
        },
    )
    request = server.replica.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.75, 5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (9, 3, 11)
    assert sampling.logit_bias == ((5, 3.0), (7, -100.0))
    assert sampling.stop_token_ids == (9,)
    assert sampling.prompt_logprobs == 1
    assert (request.tenant_salt, request.priority, request.ttft_slo_s) == ("tenant", -2, 2.5)


def test_special_tokens_are_left_out_unless_asked_for(server, client):
    server.replica.answer = lambda _: [0, *server.replica.encode("hi")]
    options = {"model": MODEL, "messages": HELLO}
    assert client.chat.completions.create(**options).choices[0].message.content == "hi"
    shown = client.chat.completions.create(**options, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].message.content == "<|im_start|>hi"


def test_harmless_fields_are_accepted(server, client):
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        store=True,
        metadata={"a": "b"},
        service_tier="auto",
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        tools=[],
        modalities=["text"],
        reasoning_effort="low",
    )
    assert len(server.replica.requests) == 1


def test_an_error_in_mid_stream_reaches_the_client_as_an_error(server, client):
    server.replica.failure_after = (3, RuntimeError("a secret of the inside"))
    stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert "secret" not in str(caught.value)
    assert "internal" in caught.value.code


def test_a_prompt_logprobs_request_shows_them_by_token_id(server, client):
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"prompt_logprobs": 2})
    first, second = reply.prompt_logprobs[:2]
    assert first is None
    token_id = str(server.replica.requests[0].prompt_token_ids[1])
    assert second[token_id]["rank"] == 1
    assert second[token_id]["logprob"] == -0.5
