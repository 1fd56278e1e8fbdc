"""Coders of plane streams: zstd on literals, and raw DEFLATE that any inflate reads.

DEFLATE streams hold literals alone (zlib's Huffman-only strategy), so that they need no history: decoders with a window
of 4 KiB, such as Intel's In-Memory Analytics Accelerator, take them too. What decodes them fastest is the native
library, which takes a whole frame at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np

from rekindle.store.codecs.general import Zstd
from rekindle.store.codecs.interface import CodecUnavailable, ElementType, Format
from rekindle.store.codecs.native_planes import ABSENT, NATIVE
from rekindle.store.codecs.planes import Plane, PlanesCodec
from rekindle.store.safetensors_file import Bytes

_WINDOW_BITS = -12
"""Raw DEFLATE with a window of 4 KiB."""


class Inflate(Protocol):
    """One stream being decoded, as zlib's `decompressobj`."""

    @property
    def eof(self) -> bool:
        """Whether the stream's end was met."""

    @property
    def unused_data(self) -> bytes:
        """What followed the end."""

    def decompress(self, data: memoryview, max_length: int) -> bytes:
        """At most so many bytes."""


class ZstdStreams:
    """Zstd made to find next to no matches, so that its work is huff0 on literals."""

    def __init__(self) -> None:
        # A target length of 0 keeps literals compressed; negative levels, with one, leave them as they are.
        self._zstd = Zstd(
            strategy=1, min_match=7, window_log=10, hash_log=6, chain_log=6, search_log=1, target_length=0
        )

    def encode(self, stream: Plane) -> bytes:
        """See `StreamCoder`."""
        return self._zstd.compress(stream)

    def decode(self, streams: Sequence[memoryview], sizes: Sequence[int]) -> Sequence[Bytes]:
        """See `StreamCoder`."""
        return [self._zstd.decompress(stream, size) for stream, size in zip(streams, sizes, strict=True)]


class DeflateStreams:
    """Raw DEFLATE, encoded by zlib and decoded by what `inflate` makes; `fault` is what that raises."""

    def __init__(self, inflate: Callable[[int], Inflate], fault: type[Exception]) -> None:
        self._inflate, self._fault = inflate, fault

    def encode(self, stream: Plane) -> bytes:
        """See `StreamCoder`."""
        return huffman_only(stream)

    def decode(self, streams: Sequence[memoryview], sizes: Sequence[int]) -> Sequence[Bytes]:
        """See `StreamCoder`."""
        return [self._decode(stream, size) for stream, size in zip(streams, sizes, strict=True)]

    def _decode(self, stream: memoryview, size: int) -> bytes:
        inflate = self._inflate(_WINDOW_BITS)
        try:
            plain = inflate.decompress(stream, size + 1)
        except self._fault as error:
            raise ValueError(str(error)) from error
        if len(plain) != size or not inflate.eof or inflate.unused_data:
            raise ValueError(f"a stream of {size} bytes inflates to {len(plain)} or does not end with them")
        return plain


class NativeDeflate:
    """DEFLATE planes by the native library. Streams that are not as it makes them are left to `inflate`."""

    name, format = "planes-deflate/native", Format.DEFLATE_PLANES

    def __init__(self, inflate: PlanesCodec) -> None:
        if NATIVE is None:
            raise CodecUnavailable(f"the native library is absent: {ABSENT}")
        self._native, self._inflate = NATIVE, inflate

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        """See `Codec`."""
        packed = np.empty(len(frame), np.uint8)
        length = self._native.pack_deflate(np.frombuffer(frame, np.uint8), element, packed)
        return packed[:length].data if 0 < length < len(frame) else None

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        """See `Codec`."""
        source, target = np.frombuffer(packed, np.uint8), np.frombuffer(out, np.uint8)
        if not self._native.unpack_deflate(source, element, target):
            self._inflate.unpack_frame(packed, element, out)


def huffman_only(stream: Plane) -> bytes:
    """Raw DEFLATE of literals alone."""
    deflate = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS, 9, zlib.Z_HUFFMAN_ONLY)
    return deflate.compress(stream.data) + deflate.flush()


def zlib_streams() -> DeflateStreams:
    """Decoded by Python's zlib, which is always there."""
    return DeflateStreams(zlib.decompressobj, zlib.error)


def isal_streams() -> DeflateStreams:
    """Decoded by ISA-L."""
    try:
        from isal import igzip_lib, isal_zlib
    except ImportError as error:
        raise CodecUnavailable("the isal library is not installed") from error
    return DeflateStreams(isal_zlib.decompressobj, cast("type[Exception]", igzip_lib.IsalError))
