"""Who may go to the engine and who is blamed for its death: decisions without processes."""

from hypothesis import given
from hypothesis import strategies as st

from rekindle.fleet.open_requests import OpenRequests
from rekindle.fleet.stream import RequestStream
from rekindle.protocol.generation import FinishReason, TokenChunk
from support.replicas import request


def opened(requests: OpenRequests, *names: str) -> list[RequestStream]:
    streams = [RequestStream(request(name)) for name in names]
    for stream in streams:
        requests.add(stream)
    return streams


def submitted(requests: OpenRequests) -> list[str]:
    """Submit all that may be."""
    names = []
    while (stream := requests.take_next()) is not None:
        names.append(stream.request_id)
    return names


def finish(stream: RequestStream) -> None:
    sent = stream.request
    stream.push(TokenChunk(sent.request_id, sent.epoch, len(sent.generated_token_ids), (1,), FinishReason.STOP))


def test_new_requests_go_to_the_engine_at_once_in_the_order_they_came() -> None:
    requests = OpenRequests(2)
    opened(requests, "a", "b", "c")
    assert submitted(requests) == ["a", "b", "c"]
    assert requests.has_running


def test_after_a_crash_suspects_go_one_by_one_and_newcomers_wait_until_all_have_given_a_token() -> None:
    requests = OpenRequests(2)
    a, b = opened(requests, "a", "b")
    assert submitted(requests) == ["a", "b"]
    assert requests.engine_lost() == []
    opened(requests, "c", "d")
    assert submitted(requests) == ["a"]
    assert not requests.note_progress(b)
    assert submitted(requests) == []
    assert requests.note_progress(a)
    assert submitted(requests) == ["b"]
    assert requests.note_progress(b)
    assert submitted(requests) == ["c", "d"]


def test_the_suspect_on_trial_takes_the_blame_for_the_second_crash() -> None:
    requests = OpenRequests(2)
    a, b, c = opened(requests, "a", "b", "c")
    submitted(requests)
    requests.engine_lost()
    submitted(requests)
    requests.note_progress(a)
    assert submitted(requests) == ["b"]
    assert requests.engine_lost() == [b]
    requests.remove(b)
    assert submitted(requests) == ["a"]
    requests.note_progress(a)
    assert submitted(requests) == ["c"]
    assert [a.num_crashes, c.num_crashes] == [1, 1]


def test_without_a_suspect_on_trial_everyone_present_at_two_crashes_is_given_up() -> None:
    requests = OpenRequests(2)
    a, b = opened(requests, "a", "b")
    submitted(requests)
    requests.engine_lost()
    for stream in (a, b):
        submitted(requests)
        requests.note_progress(stream)
    opened(requests, "new")
    assert submitted(requests) == ["new"]
    assert requests.engine_lost() == [a, b]
    assert submitted(requests) == ["new"]


def test_a_request_that_was_still_waiting_is_not_blamed() -> None:
    requests = OpenRequests(1)
    opened(requests, "a", "b")
    assert requests.take_next() is not None
    assert [stream.request_id for stream in requests.engine_lost()] == ["a"]
    assert submitted(requests) == ["b"]


def test_a_suspect_whose_client_leaves_makes_room_for_the_next() -> None:
    requests = OpenRequests(2)
    a, _ = opened(requests, "a", "b")
    submitted(requests)
    requests.engine_lost()
    assert submitted(requests) == ["a"]
    assert requests.remove(a)
    assert submitted(requests) == ["b"]


def test_only_what_the_engine_still_computes_has_to_be_aborted() -> None:
    requests = OpenRequests(2)
    waiting, running, done = opened(requests, "waiting", "running", "done")
    assert not requests.remove(waiting)
    assert submitted(requests) == ["running", "done"]
    finish(done)
    assert not requests.remove(done)
    assert requests.remove(running)
    assert not requests.has_running
    assert len(requests) == 0


@given(st.data())
def test_a_poison_among_many_is_the_only_one_given_up(data: st.DataObject) -> None:
    """An engine dies as soon as the poison is submitted, and everyone else gives a token as soon as it is."""
    names = [f"r{i}" for i in range(data.draw(st.integers(1, 12)))]
    poison = data.draw(st.sampled_from(names))
    requests = OpenRequests(2)
    opened(requests, *names)
    condemned: list[str] = []
    for _ in range(10):
        order = []
        while (stream := requests.take_next()) is not None:
            order.append(stream.request_id)
            if stream.request_id == poison:
                break
            requests.note_progress(stream)
        assert order == [name for name in names if name in order]
        if poison not in order:
            break
        for stream in requests.engine_lost():
            condemned.append(stream.request_id)
            requests.remove(stream)
    assert condemned == [poison]
    assert {stream.request_id for stream in requests} == set(names) - {poison}
    assert all(stream.is_submitted for stream in requests)


def test_what_a_dismissed_engine_was_given_goes_to_the_next_and_nobody_is_suspected() -> None:
    requests = OpenRequests(2)
    a, b = opened(requests, "a", "b")
    requests.take_next()
    requests.take_back()
    assert [stream.request.epoch for stream in (a, b)] == [1, 0]
    assert submitted(requests) == ["a", "b"]
