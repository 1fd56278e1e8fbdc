"""How protocol records travel between two processes: frames of msgpack over a stream socket.

A frame is a little-endian uint32 length, one byte that tells the record's type, and the body. The set of types is
closed; both ends run the same release, so there is no version negotiation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, TypeAlias

import msgspec

from rekindle.errors import InternalError, RequestError
from rekindle.protocol.generation import AbortRequest, GenerateRequest, TokenChunk
from rekindle.protocol.replica import (
    AddAdapter,
    EngineFatal,
    EngineReady,
    EngineSettings,
    EngineStats,
    RemoveAdapter,
    Shutdown,
)

MAX_FRAME_BYTES = 256 << 20
HEADER = struct.Struct("<IB")
"""Length of the body, and the type's tag."""


@dataclass(frozen=True, slots=True)
class StepChunks:
    """Everything one step gave, in one frame."""

    chunks: tuple[TokenChunk, ...]


Message: TypeAlias = (
    EngineSettings
    | EngineReady
    | EngineFatal
    | EngineStats
    | GenerateRequest
    | AbortRequest
    | AddAdapter
    | RemoveAdapter
    | Shutdown
    | StepChunks
)

_TYPES: tuple[type[Message], ...] = (
    EngineSettings,
    EngineReady,
    EngineFatal,
    EngineStats,
    GenerateRequest,
    AbortRequest,
    AddAdapter,
    RemoveAdapter,
    Shutdown,
    StepChunks,
)
_TAGS = {kind: tag for tag, kind in enumerate(_TYPES)}
_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = [msgspec.msgpack.Decoder(kind) for kind in _TYPES]


class WireError(InternalError):
    """A message cannot be put into a frame, or the peer sent something that is not a frame of this release."""


class TornFrame(WireError):
    """The stream ended within a frame, as it does when the peer dies while it writes."""


def encode(message: Message) -> bytes:
    """The frame of one message.

    Raises:
        WireError: it would be longer than `MAX_FRAME_BYTES`, or holds a value that msgpack cannot carry: an integer of
            more than 64 bits, or text that is not Unicode.
    """
    kind = type(message)
    try:
        body = _ENCODER.encode(message)
    except (OverflowError, UnicodeEncodeError, msgspec.MsgspecError) as error:
        raise WireError(f"a {kind.__name__} cannot be sent: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a {kind.__name__} of {len(body)} bytes cannot be sent; the limit is {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body), _TAGS[kind]) + body


def parse_header(header: bytes) -> tuple[int, int]:
    """(body length, tag) of a frame.

    Raises:
        WireError: the tag is unknown, or the length over the limit.
    """
    length, tag = HEADER.unpack(header)
    if tag >= len(_TYPES):
        raise WireError(f"not a frame of this release: its tag is {tag}, the highest known is {len(_TYPES) - 1}")
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a {_TYPES[tag].__name__} of {length} bytes is announced; the limit is {MAX_FRAME_BYTES}")
    return length, tag


def decode(tag: int, body: bytes) -> Message:
    """The message in a frame's body.

    Raises:
        WireError: the body does not hold such a message.
    """
    try:
        return _DECODERS[tag].decode(body)
    except (msgspec.MsgspecError, RequestError, UnicodeDecodeError) as error:
        raise WireError(f"a {_TYPES[tag].__name__} could not be read: {error}") from error


def read_message(stream: BinaryIO) -> Message | None:
    """The next message of a blocking stream; None where it ends between two frames.

    Raises:
        TornFrame: the stream ends within a frame.
        WireError: what comes is not a frame.
    """
    header = stream.read(HEADER.size)
    if not header:
        return None
    if len(header) < HEADER.size:
        raise TornFrame(f"the stream ended after {len(header)} of a header's {HEADER.size} bytes")
    length, tag = parse_header(header)
    body = stream.read(length)
    if len(body) < length:
        raise TornFrame(f"the stream ended after {len(body)} of {length} bytes of a {_TYPES[tag].__name__}")
    return decode(tag, body)
