"""A packed object: a header, a table of frames and the frames, in one contiguous buffer.

    header   magic, version, format, element type, frame bytes, number of frames, bytes unpacked, bytes packed,
             XXH3-64 of header and table
    table    for each frame: offset, bytes packed, bytes unpacked, XXH3-64 of the packed bytes
    frames   one after the other, without gaps

Integers are little-endian. Every frame but the last unpacks to `frame_bytes` bytes. A frame whose packed and unpacked
lengths are equal is stored as it is. Reading is strict: the table must fill the buffer exactly, and a frame's bytes are
checked before a codec sees them, so that damage anywhere is an error and never a crash or wrong bytes.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from rekindle.errors import InternalError, PackedDamaged
from rekindle.store.codecs.interface import (
    FRAME_BYTES,
    FRAME_SIZES,
    Codec,
    ElementType,
    Format,
)
from rekindle.store.safetensors_file import Bytes
from rekindle.store.xxh3 import xxh3_64_of

_MAGIC = b"RKPACK\r\n"
_VERSION = 1
_HEADER = struct.Struct("<8sHBBIQQQ")
_CHECKSUM = struct.Struct("<Q")
_ENTRY = struct.Struct("<QIIQ")
_TABLE_OFFSET = _HEADER.size + _CHECKSUM.size
_MAX_PENDING = 32
"""Frames given to an executor ahead of the one that is written; bounds what packed frames wait in memory."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a frame lies in the buffer, and what it becomes."""

    offset: int
    packed_bytes: int
    unpacked_bytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class PackedObject:
    """A checked table over a buffer; frames are checked when they are unpacked. The buffer must outlive it."""

    format: Format
    element: ElementType
    frame_bytes: int
    num_bytes: int
    frames: tuple[Frame, ...]
    buffer: memoryview

    def unpack(self, codec: Codec, out: Bytes, executor: Executor | None = None) -> None:
        """Fill the writable buffer `out`, of `num_bytes` bytes, frame by frame in the executor's threads.

        Nothing writes to `out` any more when this returns or raises.

        Raises:
            PackedDamaged: a frame does not match its checksum or does not decode. `out` holds anything.
        """
        whole = memoryview(out).cast("B")
        if len(whole) != self.num_bytes:
            raise InternalError(f"a packed object of {self.num_bytes} bytes was to be unpacked into {len(whole)}")

        starts = [(index, index * self.frame_bytes) for index in range(len(self.frames))]
        places = [(index, whole[start : start + self.frames[index].unpacked_bytes]) for index, start in starts]
        self.unpack_frames(codec, places, executor)

    def unpack_frames(
        self,
        codec: Codec,
        places: Sequence[tuple[int, memoryview]],
        executor: Executor | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """Fill each buffer with the frame of that index. Without an executor `rest` is called after each. Ends and
        raises as `unpack` does."""

        def unpack_one(place: tuple[int, memoryview]) -> None:
            self.unpack_frame(codec, *place)
            if executor is None:
                rest()

        for _ in _in_order(executor, unpack_one, places):
            pass

    def unpack_frame(self, codec: Codec, index: int, out: memoryview) -> None:
        """Fill `out` with frame `index`, which holds the bytes from `index * frame_bytes`. Raises as `unpack` does."""
        frame = self.frames[index]
        if codec.format is not self.format:
            raise InternalError(f"{codec.name} was to unpack frames of {self.format.name}")
        if len(out) != frame.unpacked_bytes:
            raise InternalError(f"frame {index} of {frame.unpacked_bytes} bytes was to be unpacked into {len(out)}")
        packed = self.buffer[frame.offset : frame.offset + frame.packed_bytes]
        if xxh3_64_of(packed) != frame.checksum:
            raise PackedDamaged(
                f"frame {index} at byte {frame.offset} of a packed object does not match its checksum; drop this copy "
                "and load the original"
            )
        if frame.packed_bytes == frame.unpacked_bytes:
            out[:] = packed
            return
        try:
            codec.unpack_frame(packed, self.element, out)
        except ValueError as error:
            raise PackedDamaged(
                f"frame {index} of a packed object is whole but {codec.name} cannot unpack it: {error}; drop this copy "
                "and load the original"
            ) from error


def packed_bound(num_bytes: int, frame_bytes: int = FRAME_BYTES) -> int:
    """The most bytes that `num_bytes` take when packed, by any codec."""
    return _TABLE_OFFSET + _ENTRY.size * -(-num_bytes // frame_bytes) + num_bytes


def pack_into(
    codec: Codec,
    data: Bytes,
    dtype: str,
    out: Bytes,
    executor: Executor | None = None,
    frame_bytes: int = FRAME_BYTES,
) -> int:
    """Pack `data` into the writable buffer `out`, of at least `packed_bound` bytes; returns how many were written.

    `dtype` is the safetensors name of the elements' type. `data` must not change meanwhile. Frames are packed in the
    executor's threads and written in order. Untouched pages of a fresh memfd cost nothing: make one of the bound's size
    and cut it to the length returned.
    """
    whole, target = memoryview(data).cast("B"), memoryview(out).cast("B")
    if frame_bytes not in FRAME_SIZES:
        raise InternalError(f"frames of {frame_bytes} bytes were asked for; 1 to 4 whole MiB are supported")
    if len(target) < packed_bound(len(whole), frame_bytes):
        raise InternalError(
            f"{len(whole)} bytes may pack to {packed_bound(len(whole), frame_bytes)}; the buffer has {len(target)}"
        )
    element = ElementType.of(dtype)

    def pack_one(start: int) -> tuple[memoryview, int, int]:
        frame = whole[start : start + frame_bytes]
        packed = codec.pack_frame(frame, element)
        body = frame if packed is None or len(packed) >= len(frame) else memoryview(packed)
        return body, xxh3_64_of(body), len(frame)

    starts = range(0, len(whole), frame_bytes)
    end = _TABLE_OFFSET + _ENTRY.size * len(starts)
    for index, (body, checksum, unpacked_bytes) in enumerate(_in_order(executor, pack_one, starts)):
        target[end : end + len(body)] = body
        _ENTRY.pack_into(target, _TABLE_OFFSET + _ENTRY.size * index, end, len(body), unpacked_bytes, checksum)
        end += len(body)
    fields = (_MAGIC, _VERSION, codec.format, element, frame_bytes, len(starts), len(whole), end)
    _HEADER.pack_into(target, 0, *fields)
    _CHECKSUM.pack_into(target, _HEADER.size, _index_digest(target, len(starts)))
    return end


def open_packed(buffer: Bytes) -> PackedObject:
    """Read and check the header and table of a packed object that is exactly `buffer`.

    Raises:
        PackedDamaged: it is not a packed object, or it is torn, cut off, of another version or damaged.
    """
    view = memoryview(buffer).cast("B").toreadonly()
    if len(view) < _TABLE_OFFSET:
        raise _damaged(f"its {len(view)} bytes are fewer than a header's {_TABLE_OFFSET}")
    magic, version, format_, element, frame_bytes, num_frames, num_bytes, packed_bytes = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise _damaged("it does not begin as one")
    if version != _VERSION:
        raise _damaged(f"it is of version {version}; this build reads version {_VERSION}")
    if packed_bytes != len(view):
        raise _damaged(f"its header says {packed_bytes} bytes, it has {len(view)}")
    if num_frames > (len(view) - _TABLE_OFFSET) // _ENTRY.size:
        raise _damaged(f"a table of {num_frames} frames does not fit its {len(view)} bytes")
    if _CHECKSUM.unpack_from(view, _HEADER.size)[0] != _index_digest(view, num_frames):
        raise _damaged("its header and table do not match their checksum")
    if format_ not in set(Format) or element not in set(ElementType):
        raise _damaged(f"format {format_} of element type {element} is not known")
    if frame_bytes not in FRAME_SIZES or num_frames != -(-num_bytes // frame_bytes):
        raise _damaged(f"{num_frames} frames of {frame_bytes} bytes do not hold {num_bytes}")
    frames = tuple(_checked_frames(view, frame_bytes, num_frames, num_bytes))
    return PackedObject(Format(format_), ElementType(element), frame_bytes, num_bytes, frames, view)


def _checked_frames(view: memoryview, frame_bytes: int, num_frames: int, num_bytes: int) -> Iterator[Frame]:
    end = table_end = _TABLE_OFFSET + _ENTRY.size * num_frames
    left = num_bytes
    for index, fields in enumerate(_ENTRY.iter_unpack(view[_TABLE_OFFSET:table_end])):
        frame = Frame(*fields)
        if frame.offset != end or not 0 < frame.packed_bytes <= frame.unpacked_bytes:
            raise _damaged(f"frame {index} takes {frame.packed_bytes} bytes at {frame.offset}, expected at {end}")
        if frame.unpacked_bytes != min(frame_bytes, left):
            raise _damaged(f"frame {index} unpacks to {frame.unpacked_bytes} bytes, not {min(frame_bytes, left)}")
        end += frame.packed_bytes
        left -= frame.unpacked_bytes
        yield frame
    if end != len(view):
        raise _damaged(f"its frames end at byte {end}, it at {len(view)}")


def _in_order(
    executor: Executor | None, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """Results in the order of `items`. When it ends, by an error too, no call is running or waiting any more."""
    if executor is None:
        yield from map(function, items)
        return
    left = iter(items)
    pending = deque(executor.submit(function, item) for item in islice(left, _MAX_PENDING))
    try:
        while pending:
            result = pending.popleft().result()
            pending.extend(executor.submit(function, item) for item in islice(left, 1))
            yield result
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def _index_digest(view: memoryview, num_frames: int) -> int:
    table = view[_TABLE_OFFSET : _TABLE_OFFSET + _ENTRY.size * num_frames]
    return xxh3_64_of(bytes(view[: _HEADER.size]) + bytes(table))


def _damaged(what: str) -> PackedDamaged:
    return PackedDamaged(f"this is no sound packed object: {what}; drop this copy and load the original")
