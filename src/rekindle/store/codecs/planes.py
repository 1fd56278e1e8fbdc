"""Frames of byte planes: what the bytes are, in numpy. The native library does the same, faster.

Weights are noise in their low bits and far from it in their exponents, so a frame is split into planes of bytes, most
significant first, and each plane is coded for itself. Elements whose exponent straddles two bytes are rotated left by
one bit first, which brings the exponent into the first plane and the sign into the last.

Planes are cut into streams of `STREAM_BYTES`; the streams of all planes over the same elements make a chunk:

    lengths   of every stream, 32 bits each, chunk by chunk, in a chunk plane by plane
    streams   in that order
    tail      the bytes after the last whole element, as they are

A stream as long as its part of the plane is that part as it is, otherwise a stream of one byte is that byte repeated,
and any other is coded. Streams are independent, so that GPUs and accelerators decode them side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rekindle.store.codecs.interface import ElementType, Format
from rekindle.store.codecs.native_planes import NATIVE
from rekindle.store.safetensors_file import Bytes
from rekindle.units import KIB

STREAM_BYTES = 64 * KIB
"""Of one plane. The largest that every hardware decoder takes; also the elements of a chunk."""

WORTH_BITS = 7.8
"""A plane with more entropy for each byte is stored as it is: it would gain less than its decoding costs."""

Plane = NDArray[np.uint8]


class StreamCoder(Protocol):
    """Entropy coding of the streams of planes."""

    def encode(self, stream: Plane) -> bytes:
        """The coded stream."""

    def decode(self, streams: Sequence[memoryview], sizes: Sequence[int]) -> Sequence[Bytes]:
        """Each stream's bytes, exactly `sizes` of them.

        Raises:
            ValueError: a stream is damaged, or of another size.
        """


class PlanesCodec:
    """Frames of planes whose streams `coder` codes."""

    def __init__(self, name: str, format_: Format, coder: StreamCoder) -> None:
        self.name, self.format, self._coder = name, format_, coder

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        """See `Codec`."""
        planes = split(frame, element)
        worth = [len(plane) > 0 and entropy_bits(plane) < WORTH_BITS for plane in planes]
        streams: list[Bytes] = []
        for start in range(0, len(planes[0]), STREAM_BYTES):
            for plane, is_worth in zip(planes, worth, strict=True):
                streams.append(self._pack_stream(plane[start : start + STREAM_BYTES], is_worth))
        lengths = np.array([len(stream) for stream in streams], "<u4")
        num_elements = len(frame) // element.num_planes
        body = b"".join((lengths.tobytes(), *streams, frame[num_elements * element.num_planes :]))
        return body if len(body) < len(frame) else None

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        """See `Codec`."""
        num_planes = element.num_planes
        num_elements, tail_bytes = divmod(len(out), num_planes)
        sizes = [
            min(STREAM_BYTES, num_elements - start)
            for start in range(0, num_elements, STREAM_BYTES)
            for _ in range(num_planes)
        ]
        streams = list(_cut(packed, sizes, tail_bytes))
        coded = [index for index, stream in enumerate(streams) if len(stream) not in (1, sizes[index])]
        decoded = self._coder.decode([streams[index] for index in coded], [sizes[index] for index in coded])
        plains: list[Bytes] = [*streams]
        for index, plain in zip(coded, decoded, strict=True):
            plains[index] = plain
        elements = np.frombuffer(out, np.uint8)
        for first in range(0, len(plains), num_planes):
            size, start = sizes[first], first * STREAM_BYTES
            planes = [_plane(plain, size) for plain in plains[first : first + num_planes]]
            join(planes, element, elements[start : start + size * num_planes])
        out[num_elements * num_planes :] = packed[len(packed) - tail_bytes :]

    def _pack_stream(self, plain: Plane, is_worth: bool) -> Bytes:
        if (plain == plain[0]).all():
            return plain[:1].tobytes()
        coded = self._coder.encode(plain) if is_worth else b""
        return coded if 1 < len(coded) < len(plain) else plain.tobytes()


def split(frame: memoryview, element: ElementType) -> list[Plane]:
    """The planes of a frame's whole elements, most significant first."""
    num_elements = len(frame) // element.num_planes
    if NATIVE is not None:
        planes = np.empty((element.num_planes, num_elements), np.uint8)
        NATIVE.split(np.frombuffer(frame, np.uint8), element, planes)
        return list(planes)
    return split_in_numpy(frame, element)


def join(planes: Sequence[Plane], element: ElementType, out: Plane) -> None:
    """Write the elements that `planes` make up to `out`."""
    if NATIVE is not None:
        NATIVE.join(planes, element, out)
    else:
        join_in_numpy(planes, element, out)


def split_in_numpy(frame: memoryview, element: ElementType) -> list[Plane]:
    """The specification of `split`."""
    width = element.num_planes
    words = np.frombuffer(frame, f"<u{width}", len(frame) // width)
    if element.exponent_straddles:
        words = words << 1 | words >> (8 * width - 1)
    octets = words.astype(f">u{width}").view(np.uint8).reshape(-1, width)
    return [np.ascontiguousarray(octets[:, place]) for place in range(width)]


def join_in_numpy(planes: Sequence[Plane], element: ElementType, out: Plane) -> None:
    """The specification of `join`."""
    width = element.num_planes
    octets = np.stack(planes, axis=1)
    words = octets.view(f">u{width}").reshape(-1).astype(f"<u{width}")
    if element.exponent_straddles:
        words = words >> 1 | words << (8 * width - 1)
    out[:] = words.view(np.uint8)


def entropy_bits(plane: Plane) -> float:
    """Order-0 entropy of a byte, in bits; `plane` is not empty."""
    shares = np.bincount(plane, minlength=256) / len(plane)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def _cut(packed: memoryview, sizes: Sequence[int], tail_bytes: int) -> Iterator[memoryview]:
    at, last = 4 * len(sizes), len(packed) - tail_bytes
    if at > last:
        raise ValueError(f"its {len(packed)} bytes do not hold {len(sizes)} lengths and a tail of {tail_bytes}")
    for length, size in zip(np.frombuffer(packed, "<u4", len(sizes)).tolist(), sizes, strict=True):
        if not 0 < length <= min(size, last - at):
            raise ValueError(f"a stream of {size} bytes takes {length} at byte {at}, {last - at} are left")
        yield packed[at : at + length]
        at += length
    if at != last:
        raise ValueError(f"its streams end at byte {at}, its tail begins at {last}")


def _plane(plain: Bytes, size: int) -> Plane:
    octets = np.frombuffer(plain, np.uint8)
    return octets if len(octets) == size else np.full(size, octets[0])
