"""What a client may get wrong, and what it is told."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from rekindle.errors import DeadlineUnreachable, EngineFailed, Overloaded, ReplicaUnavailable

MODEL = "org/tiny:v1"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def post(server):
    def post(path: str = "chat/completions", *, content: bytes | None = None, **fields) -> httpx.Response:
        body = {"model": MODEL, "messages": HELLO} if path == "chat/completions" else {"model": MODEL}
        data = json.dumps({**body, **fields}).encode() if content is None else content
        return httpx.post(f"{server.url}/v1/{path}", content=data, headers={"content-type": "application/json"})

    return post


def refusal(response: httpx.Response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not any(jargon in error["message"].lower() for jargon in ("pydantic", "traceback", "validator", "input_"))
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {str(token_id): 1 for token_id in range(301)}}, "logit_bias"),
        ({"stop_token_ids": [5] * 1025}, "stop_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"model": 5}, "model"),
        ({"model": None}, "model"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 513}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**30}, "n"),
        ({"seed": 10**30}, "seed"),
        ({"top_k": -2}, "top_k"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"cache_salt": "s" * 1025}, "cache_salt"),
        ({"priority": 1.5}, "priority"),
        ({"ttft_slo_ms": 0}, "ttft_slo_ms"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
    ],
)
def test_a_wrong_field_of_a_chat_is_refused_by_its_name(server, post, fields, param):
    error = refusal(post(**fields))
    assert error["param"] == param
    assert error["code"] == "context_length_exceeded" or param.split("[")[0].split(".")[0] in error["message"]
    assert error["type"] == "invalid_request_error"
    assert server.replica.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 600, "n": 2}, "prompt"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ],
)
def test_a_wrong_field_of_a_completion_is_refused_by_its_name(server, post, fields, param):
    assert refusal(post("completions", **fields))["param"] == param
    assert server.replica.requests == []


def test_an_unknown_field_is_named_with_the_nearest_one(post):
    error = refusal(post(temprature=1))
    assert error["message"] == "Unrecognized request argument supplied: temprature. Did you mean `temperature`?"
    assert error["param"] == "temprature"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"model": "a"',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"model": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b"[" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model": "m", "metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_body_that_is_no_json_object_is_refused(post, content):
    assert refusal(post(content=content))["code"] == "invalid_json"


def test_a_prompt_that_is_too_long_is_refused_with_the_numbers(post):
    error = refusal(post("completions", prompt=[5] * 600, max_tokens=10))
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("512", "610", "600", "10"))


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody/nothing", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "nobody/nothing" in str(caught.value)


def test_a_model_of_another_server_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="does not serve it"):
        client.chat.completions.create(model="not/served", messages=HELLO)


def test_a_field_of_a_wrong_type_raises_the_clients_bad_request(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature="hot")
    assert caught.value.param == "temperature"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refused", "expected", "status"),
    [
        (Overloaded("the queue of 8 is full", retry_after_s=1.5), openai.RateLimitError, 429),
        (DeadlineUnreachable("2 s are too few", retry_after_s=1.5), openai.RateLimitError, 429),
        (ReplicaUnavailable("the engine is starting", retry_after_s=0.2), openai.InternalServerError, 503),
    ],
)
def test_a_replica_without_room_says_when_to_come_back(server, client, stream, refused, expected, status):
    server.replica.refusal = refused
    with pytest.raises(expected) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
    headers = caught.value.response.headers
    assert caught.value.status_code == status
    assert headers["x-should-retry"] == "true"
    assert int(headers["retry-after-ms"]) == refused.retry_after_s * 1000
    assert int(headers["retry-after"]) >= 1


def test_a_request_the_engine_gave_up_is_not_to_be_repeated(server, client):
    server.replica.refusal = EngineFailed("this request was present at two crashes")
    with pytest.raises(openai.InternalServerError, match="two crashes") as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_unforeseen_fault_names_the_request_and_nothing_inside(server, caplog):
    server.replica.refusal = ZeroDivisionError("a secret of the inside")
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"model": MODEL, "messages": HELLO},
        headers={"x-request-id": "mine-1"},
    )
    error = refusal(response, 500)
    assert "mine-1" in error["message"]
    assert "secret" not in response.text
    assert "a secret of the inside" in caplog.text


def test_unknown_paths_and_methods_are_answered_in_the_error_form(server):
    assert refusal(httpx.get(f"{server.url}/v1/nothing"), 404)["code"] == "not_found"
    wrong = httpx.get(f"{server.url}/v1/chat/completions")
    assert refusal(wrong, 405)["code"] == "method_not_allowed"
    assert "POST" in wrong.headers["allow"]


def test_a_body_over_the_limit_is_refused_before_it_is_parsed(server):
    error = refusal(httpx.post(f"{server.url}/v1/completions", content=b"x" * (2 << 20)), 413)
    assert "1 MiB" in error["message"]


def test_a_body_of_unannounced_length_is_cut_off_at_the_limit(server):
    pieces = (b"x" * 65536 for _ in range(32))
    assert refusal(httpx.post(f"{server.url}/v1/completions", content=pieces), 413)["code"] == "request_too_large"


def test_a_sane_request_id_comes_back_and_a_strange_one_does_not(server):
    assert httpx.get(f"{server.url}/health", headers={"x-request-id": "a-b:1"}).headers["x-request-id"] == "a-b:1"
    for strange in ("x" * 200, "a b", "a\tb"):
        answered = httpx.get(f"{server.url}/health", headers={"x-request-id": strange}).headers["x-request-id"]
        assert answered != strange
        assert len(answered) == 32


def test_a_wrong_query_parameter_is_named(server):
    assert refusal(httpx.get(f"{server.url}/v1/adapters?limit=many"))["param"] == "limit"
    assert refusal(httpx.get(f"{server.url}/v1/adapters?limit=0"))["param"] == "limit"
