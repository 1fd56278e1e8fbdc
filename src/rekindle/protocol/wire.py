"""How protocol records travel between two processes: frames of msgpack over a stream socket.

A frame is a little-endian uint32 length, one byte that tells the record's type, and the body. The set of types is
closed; both ends run the same release, so there is no version negotiation.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from rekindle.errors import InternalError
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
    """The peer sent something that is not a frame of this release."""


def encode(message: Message) -> bytes:
    """The frame of one message.

    Raises:
        WireError: it would be longer than `MAX_FRAME_BYTES`.
    """
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a {type(message).__name__} of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body), _TAGS[type(message)]) + body


def parse_header(header: bytes) -> tuple[int, int]:
    """(body length, tag) of a frame.

    Raises:
        WireError: the tag is unknown or the length over the limit.
    """
    length, tag = HEADER.unpack(header)
    if tag >= len(_TYPES) or length > MAX_FRAME_BYTES:
        raise WireError(f"not a frame: tag {tag}, length {length}")
    return length, tag


def decode(tag: int, body: bytes) -> Message:
    """The message in a frame's body.

    Raises:
        WireError: the body does not hold such a message.
    """
    try:
        return _DECODERS[tag].decode(body)
    except msgspec.MsgspecError as error:
        raise WireError(f"a {_TYPES[tag].__name__} could not be read: {error}") from error
