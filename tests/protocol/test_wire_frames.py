"""Frames: every record survives the trip, and nothing else is taken for a frame."""

import io
import struct
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rekindle.protocol.generation import AbortRequest, GenerateRequest, TokenChunk
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import (
    AddAdapter,
    EngineFatal,
    EngineReady,
    EngineSettings,
    EngineStats,
    RemoveAdapter,
    Shutdown,
)
from rekindle.protocol.sampling import SamplingParams
from rekindle.protocol.storage import BLOCK_BYTES, MAX_CHUNK_BYTES, MAX_THREADS, StorageProfile
from rekindle.protocol.wire import HEADER, MAX_FRAME_BYTES, StepChunks, TornFrame, WireError, encode, read_message

KINDS = [
    EngineSettings, EngineReady, EngineFatal, EngineStats, GenerateRequest, AbortRequest, AddAdapter, RemoveAdapter,
    Shutdown, StepChunks,
]  # fmt: skip
INTEGERS = st.integers(-(2**63), 2**64 - 1)
st.register_type_strategy(int, INTEGERS)
st.register_type_strategy(float, st.floats(allow_nan=False))
st.register_type_strategy(str, st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
st.register_type_strategy(
    SamplingParams,
    st.builds(
        SamplingParams,
        max_tokens=st.integers(0, 2**40),
        seed=INTEGERS,
        min_tokens=st.just(0),
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 2**31),
        top_p=st.floats(0.01, 1),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(0.01, 100),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        logit_bias=st.lists(st.tuples(INTEGERS, st.floats(-100, 100)), max_size=3).map(tuple),
        stop_token_ids=st.lists(INTEGERS, max_size=3).map(tuple),
        logprobs=st.none() | st.integers(0, 20),
        prompt_logprobs=st.none() | st.integers(0, 20),
    ),
)
st.register_type_strategy(
    StorageProfile,
    st.builds(
        StorageProfile,
        chunk_bytes=st.integers(1, MAX_CHUNK_BYTES // BLOCK_BYTES).map(lambda count: count * BLOCK_BYTES),
        num_threads=st.integers(1, MAX_THREADS),
    ),
)
SHARES = st.floats(0, 1e6, exclude_min=True)
st.register_type_strategy(
    GenerateRequest,
    st.builds(
        GenerateRequest,
        request_id=st.from_type(RequestId),
        prompt_token_ids=st.lists(INTEGERS, max_size=3).map(tuple),
        sampling=st.from_type(SamplingParams),
        epoch=INTEGERS,
        adapter=st.none() | st.from_type(AdapterDigest),
        generated_token_ids=st.lists(INTEGERS, max_size=3).map(tuple),
        tenant_salt=st.from_type(str),
        tenant=st.from_type(str),
        weight=SHARES,
        priority=INTEGERS,
        ttft_slo_s=st.none() | SHARES,
    ),
)
MESSAGES = st.sampled_from(KINDS).flatmap(st.from_type)
RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=100)
EXAMPLE = StepChunks((TokenChunk(RequestId("r"), 1, 3, (7, 8)),))


def read(data: bytes) -> Any:
    return read_message(io.BytesIO(data))


@RELAXED
@given(MESSAGES)
def test_every_message_arrives_as_it_was_sent(message: Any) -> None:
    received = read(encode(message))
    assert received == message
    assert type(received) is type(message)


@RELAXED
@given(st.lists(MESSAGES, max_size=5))
def test_messages_arrive_in_order_up_to_the_end_of_the_stream(messages: list[Any]) -> None:
    stream = io.BytesIO(b"".join(map(encode, messages)))
    assert [read_message(stream) for _ in messages] == messages
    assert read_message(stream) is None


@pytest.mark.parametrize("length", range(1, len(encode(EXAMPLE))))
def test_a_stream_that_ends_within_a_frame_is_torn(length: int) -> None:
    with pytest.raises(TornFrame, match="header's" if length < HEADER.size else "of a StepChunks"):
        read(encode(EXAMPLE)[:length])


@RELAXED
@given(MESSAGES, st.data())
def test_damaged_bytes_are_a_message_or_an_error_of_the_wire(message: Any, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        received = read(bytes(frame))
    except WireError:
        return
    assert type(received) in KINDS


@RELAXED
@given(st.binary(min_size=1, max_size=64))
def test_random_bytes_are_a_message_or_an_error_of_the_wire(data: bytes) -> None:
    try:
        received = read(data)
    except WireError:
        return
    assert type(received) in KINDS


@pytest.mark.parametrize("length", [MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_a_giant_length_is_refused_before_anything_is_read(length: int) -> None:
    stream = io.BytesIO(struct.pack("<IB", length, 0) + b"x" * 100)
    with pytest.raises(WireError, match=f"of {length} bytes is announced; the limit is {MAX_FRAME_BYTES}"):
        read_message(stream)
    assert stream.tell() == HEADER.size


def test_an_unknown_type_of_frame_is_refused_with_its_number() -> None:
    with pytest.raises(WireError, match="its tag is 200"):
        read(struct.pack("<IB", 0, 200))


def test_a_body_of_another_record_is_refused_with_the_name_that_was_expected() -> None:
    frame = bytearray(encode(EXAMPLE))
    frame[HEADER.size - 1] = encode(AbortRequest(RequestId("r")))[HEADER.size - 1]
    with pytest.raises(WireError, match="AbortRequest could not be read"):
        read(bytes(frame))


def test_sampling_settings_out_of_range_are_refused_on_arrival() -> None:
    request = GenerateRequest(RequestId("r"), (1,), SamplingParams(max_tokens=3, seed=0, top_p=0.5))
    half, two = struct.pack(">d", 0.5), struct.pack(">d", 2.0)
    with pytest.raises(WireError, match="top_p"):
        read(encode(request).replace(half, two))


@pytest.mark.parametrize("changes", [{"tenant_salt": "\ud800"}, {"prompt_token_ids": (2**64,)}])
def test_a_value_that_msgpack_cannot_carry_is_an_error_of_the_wire(changes: dict[str, Any]) -> None:
    values = {"prompt_token_ids": (1,), **changes}
    with pytest.raises(WireError, match="GenerateRequest cannot be sent"):
        encode(GenerateRequest(RequestId("r"), sampling=SamplingParams(max_tokens=1, seed=0), **values))


def test_a_message_over_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rekindle.protocol.wire"], "MAX_FRAME_BYTES", 10)
    with pytest.raises(WireError, match=r"StepChunks of .* the limit is 10"):
        encode(EXAMPLE)
