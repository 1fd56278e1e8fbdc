"""Clients that leave, clients that read slowly, and a server that is about to stop."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
import openai
import pytest

from rekindle.errors import ReplicaUnavailable
from rekindle.gateway.app import create_app
from rekindle.gateway.generation import MAILBOX_DELTAS
from rekindle.gateway.lifecycle import Lifecycle

MODEL = "org/tiny:v1"
HELLO = [{"role": "user", "content": "hello"}]


def test_leaving_a_stream_aborts_its_sequences(server, client, eventually):
    server.replica.hold_after = 2
    with client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, n=3) as stream:
        next(iter(stream))
        eventually(lambda: len(server.replica.active) == 3, "three sequences run")
    eventually(lambda: len(server.replica.aborted) == 3, "three sequences are aborted")
    assert server.replica.active == set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_after", [0, 2])
def test_leaving_before_the_answer_aborts_the_sequence(server, eventually, stream, hold_after):
    server.replica.hold_after = hold_after
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": MODEL, "messages": HELLO, "stream": stream},
            timeout=httpx.Timeout(20, read=0.3),
        )
    eventually(lambda: len(server.replica.aborted) == 1, "the sequence is aborted")


async def test_cancelling_the_asynchronous_client_aborts_the_sequence(server, eventually):
    server.replica.hold_after = 2
    async with server.async_client() as client:
        task = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=HELLO))
        await asyncio.to_thread(eventually, lambda: len(server.replica.active) == 1, "the sequence runs")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(eventually, lambda: len(server.replica.aborted) == 1, "the sequence is aborted")


def test_a_stream_that_waits_for_its_first_token_sends_comments_which_clients_skip(start_server, eventually):
    with start_server(comment_every_s=0.02) as server, server.client() as client:
        server.replica.hold_after = 0
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert [next(lines) for _ in range(4)] == [": waiting", "", ": waiting", ""]
            server.replica.release()
            events = [line for line in lines if line.startswith("data: ")]
        assert json.loads(events[0].removeprefix("data: "))["choices"][0]["delta"]["role"] == "assistant"
        assert events[-1] == "data: [DONE]"
        server.replica.reset()
        server.replica.hold_after = 0
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        threading.Timer(0.2, lambda: server.loop.call_soon_threadsafe(server.replica.release)).start()
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "the quick brown fox"


def test_a_request_that_fails_after_comments_fails_within_the_stream(start_server):
    with start_server(comment_every_s=0.02) as server:
        server.replica.hold_after = 0
        server.replica.failure_after = (0, ReplicaUnavailable("gone for good", retry_after_s=1.0))
        body = {"model": MODEL, "messages": HELLO, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == ": waiting"
            server.replica.release()
            events = [line for line in lines if line.startswith("data: ")]
        assert "gone for good" in json.loads(events[0].removeprefix("data: "))["error"]["message"]
        assert events[-1] == "data: [DONE]"


class UnreadConnection:
    """One streamed request over plain ASGI, whose client takes `num_taken` messages and then reads nothing more."""

    def __init__(self, num_taken: int) -> None:
        self._room = asyncio.Semaphore(num_taken)
        self._asked = False
        self.stopped_reading = asyncio.Event()
        self.sent: list[dict] = []

    async def receive(self) -> dict:
        if self._asked:
            await asyncio.Event().wait()
        self._asked = True
        body = {"model": MODEL, "prompt": "x", "max_tokens": 500, "stream": True}
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(self, message: dict) -> None:
        if self._room.locked():
            self.stopped_reading.set()
        await self._room.acquire()
        self.sent.append(message)

    async def run(self, app) -> None:
        path = "/v1/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": []}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
        await app(scope, self.receive, self.send)


async def test_a_client_that_stops_reading_stops_its_sequence_and_nothing_grows(make_services):
    services = make_services()
    replica = services.bases[0].replica
    replica.answer = lambda request: [60] * request.sampling.max_tokens
    connection = UnreadConnection(num_taken=3)
    task = asyncio.create_task(connection.run(create_app(services)))
    await connection.stopped_reading.wait()
    for _ in range(1000):
        await asyncio.sleep(0)
    assert len(connection.sent) == 3
    assert MAILBOX_DELTAS <= replica.num_yielded <= MAILBOX_DELTAS + 10
    assert len(replica.active) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(replica.aborted) == 1


async def test_a_client_that_never_reads_again_is_given_up(make_services):
    services = make_services(send_timeout_s=0.05)
    replica = services.bases[0].replica
    replica.answer = lambda request: [60] * request.sampling.max_tokens
    connection = UnreadConnection(num_taken=3)
    await connection.run(create_app(services))
    assert len(replica.aborted) == 1
    assert connection.sent[-1]["more_body"] is True


def test_a_draining_server_finishes_open_streams_and_takes_nothing_new(start_server, eventually):
    with start_server() as server, server.client() as client:
        lifecycle = server.services.lifecycle
        server.replica.hold_after = 2
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        text: list[str] = []
        reader = threading.Thread(target=lambda: text.extend(c.choices[0].delta.content or "" for c in stream))
        reader.start()
        eventually(lambda: lifecycle.num_active == 1, "the stream runs")
        lifecycle.begin_draining()
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        assert httpx.get(f"{server.url}/ready").json()["status"] == "draining"
        assert httpx.get(f"{server.url}/health").status_code == 200
        register = httpx.post(f"{server.url}/v1/adapters", json={"name": "x", "source": "/x"})
        assert register.status_code == 503
        idle = asyncio.run_coroutine_threadsafe(lifecycle.idle(), server.loop)
        assert not idle.done()
        server.replica.release()
        reader.join()
        idle.result(timeout=10)
        assert "".join(text) == "the quick brown fox"


async def test_work_is_counted_until_it_ends_however_it_ends():
    lifecycle = Lifecycle()
    with pytest.raises(ZeroDivisionError), lifecycle.work(1):
        assert lifecycle.num_active == 1
        raise ZeroDivisionError
    assert lifecycle.num_active == 0
    await lifecycle.idle()
