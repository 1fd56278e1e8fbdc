"""Frames between processes: whatever goes in comes out, and nothing else is taken for a frame."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.protocol import wire
from rekindle.protocol.adapters import AdapterManifest, LoraBinding, ReplacedMatrix
from rekindle.protocol.estimates import StageEstimate
from rekindle.protocol.generation import (
    AbortRequest,
    FinishReason,
    GenerateRequest,
    Refusal,
    TokenChunk,
    TokenLogprobs,
)
from rekindle.protocol.identity import AdapterDigest, ModelDigest, RequestId
from rekindle.protocol.models import ModelManifest, ModuleShape
from rekindle.protocol.replica import (
    AddAdapter,
    EngineFatal,
    EngineReady,
    EngineSettings,
    EngineStats,
    PoolBytes,
    RemoveAdapter,
    Shutdown,
)
from rekindle.protocol.sampling import SamplingParams

tokens = st.lists(st.integers(0, 2**31), max_size=30).map(tuple)
numbers = st.floats(-50, 0)
names = st.text(max_size=20)
logprobs = st.builds(
    TokenLogprobs,
    token_id=st.integers(0, 2**31),
    logprob=numbers,
    top=st.lists(st.tuples(st.integers(0, 2**31), numbers), max_size=3).map(tuple),
)
requests = st.builds(
    GenerateRequest,
    request_id=names.map(RequestId),
    prompt_token_ids=tokens,
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.integers(0, 9000),
        seed=st.integers(-(2**63), 2**64 - 1),
        temperature=st.floats(0, 2),
        logit_bias=st.lists(st.tuples(st.integers(0, 1000), st.floats(-100, 100)), max_size=3).map(tuple),
        stop_token_ids=tokens,
        logprobs=st.none() | st.integers(0, 20),
    ),
    adapter=st.none() | names.map(AdapterDigest),
    generated_token_ids=tokens,
    tenant_salt=names,
)
chunks = st.builds(
    TokenChunk,
    request_id=names.map(RequestId),
    epoch=st.integers(0, 9),
    offset=st.integers(0, 9000),
    token_ids=tokens,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    logprobs=st.none() | st.lists(logprobs, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(st.none() | logprobs, max_size=3).map(tuple),
    cached_tokens=st.none() | st.integers(0, 9000),
    error=st.none() | names,
    refusal=st.none()
    | st.builds(Refusal, kind=names, field=st.none() | names, retry_after_s=st.none() | st.floats(0, 9)),
)
MODEL = ModelManifest(
    ModelDigest("m"), "llama", "BF16", 10, 20, 2, 100, 64, (2, 3), True, (ModuleShape("lm_head", "linear", 8, 100),)
)
ADAPTER = AdapterManifest(
    AdapterDigest("a"), MODEL.digest, "F32", 128, (4, 8), ("lm_head",),
    (LoraBinding("lm_head", "lm_head", -1, 4, 0.5, 8, 100, 0, 64),), (ReplacedMatrix("x", "embed_tokens", 2, 3, 64),),
)  # fmt: skip
MESSAGES: list[wire.Message] = [
    EngineSettings("/m", MODEL, "bfloat16", 1 << 40, 16, 512, 64, 100, 2),
    EngineReady(10, 4096, 16, 64, (("weights", 0.5),)),
    EngineFatal("no", True),
    EngineStats(
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        PoolBytes(*range(9)),
        (AdapterDigest("a"),),
        7,
        8,
        9,
        10,
        11,
        12,
        13,
        0.5,
        *range(14, 19),
        load_estimates=(
            StageEstimate("disk->device", 0.5, None, 1, None),
            StageEstimate("remote->disk", 0.5, 1e9, 2, 0.1),
        ),
    ),
    AbortRequest(RequestId("r")),
    AddAdapter(ADAPTER, "/a"),
    RemoveAdapter(AdapterDigest("a")),
    Shutdown(),
]


def roundtrip(message: wire.Message) -> wire.Message:
    frame = wire.encode(message)
    length, tag = wire.parse_header(frame[: wire.HEADER.size])
    body = frame[wire.HEADER.size :]
    assert len(body) == length
    return wire.decode(tag, body)


@given(requests)
def test_requests_come_out_as_they_went_in(request: GenerateRequest) -> None:
    assert roundtrip(request) == request


@given(st.lists(chunks, max_size=4))
def test_the_chunks_of_a_step_come_out_as_they_went_in(step: list[TokenChunk]) -> None:
    message = wire.StepChunks(tuple(step))
    assert roundtrip(message) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_kind_of_message_comes_out_as_it_went_in(message: wire.Message) -> None:
    assert roundtrip(message) == message


@given(requests)
def test_a_truncated_body_is_an_error_at_every_length(request: GenerateRequest) -> None:
    frame = wire.encode(request)
    tag, body = frame[4], frame[wire.HEADER.size :]
    for length in range(len(body)):
        with pytest.raises(wire.WireError):
            wire.decode(tag, body[:length])


@pytest.mark.parametrize("header", [wire.HEADER.pack(1, 200), wire.HEADER.pack(wire.MAX_FRAME_BYTES + 1, 0)])
def test_unknown_tags_and_giant_lengths_are_not_frames(header: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.parse_header(header)


def test_a_body_of_another_kind_is_an_error() -> None:
    with pytest.raises(wire.WireError, match="EngineReady"):
        wire.decode(1, wire.encode(MESSAGES[2])[wire.HEADER.size :])
