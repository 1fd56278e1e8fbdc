"""Byte planes and their streams: the native library against numpy, and our DEFLATE against other inflates."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import isal_zlib

from rekindle.store.codecs import planes
from rekindle.store.codecs.entropy import zlib_streams
from rekindle.store.codecs.interface import ElementType, Format
from rekindle.store.codecs.native_planes import NATIVE
from rekindle.store.codecs.planes import STREAM_BYTES, PlanesCodec, join_in_numpy, split_in_numpy
from rekindle.store.codecs.registry import codec_named
from rekindle.units import KIB

needs_native = pytest.mark.skipif(NATIVE is None, reason="the native library was not built here")
SPECIFICATION = PlanesCodec("specification", Format.DEFLATE_PLANES, zlib_streams())
SMALLEST_WINDOW = -9
"""Raw DEFLATE with a window of 512 bytes: an inflate given this refuses matches further back."""


def normal(num_elements: int, deviation: float, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).normal(0, deviation, num_elements)
    return values.round().astype(np.int8).tobytes()


def coded_streams(frame: bytes, element: ElementType, size: int) -> list[tuple[bytes, int]]:
    """Coded streams of a packed frame and how many bytes each stands for, read by the layout's description."""
    num_elements = size // element.num_planes
    sizes = [
        min(STREAM_BYTES, num_elements - start)
        for start in range(0, num_elements, STREAM_BYTES)
        for _ in range(element.num_planes)
    ]
    lengths, at, found = np.frombuffer(frame, "<u4", len(sizes)), 4 * len(sizes), []
    for length, plain in zip(lengths.tolist(), sizes, strict=True):
        if length not in (1, plain):
            found.append((frame[at : at + length], plain))
        at += length
    return found


@pytest.mark.parametrize("element", ElementType, ids=lambda element: element.name)
@given(content=st.binary(max_size=200))
def test_planes_join_to_what_was_split(element: ElementType, content: bytes) -> None:
    whole = len(content) // element.num_planes * element.num_planes
    out = np.zeros(whole, np.uint8)
    join_in_numpy(split_in_numpy(memoryview(content), element), element, out)
    assert out.tobytes() == content[:whole]


@pytest.mark.parametrize(("element", "bits"), [(ElementType.BF16, 16), (ElementType.F32, 32)])
def test_the_first_plane_is_the_exponent_and_the_last_holds_the_sign(element: ElementType, bits: int) -> None:
    sign, exponent, mantissa = 1, 0b10110011, 0b0101110
    word = sign << (bits - 1) | exponent << (bits - 9) | mantissa << (bits - 16)
    found = split_in_numpy(memoryview(word.to_bytes(bits // 8, "little")), element)
    assert found[0].tolist() == [exponent]
    assert found[-1][0] & 1 == sign


@needs_native
@pytest.mark.parametrize("element", ElementType, ids=lambda element: element.name)
@pytest.mark.parametrize("num_elements", [0, 1, 3, 31, 64, 1000])
def test_native_planes_equal_the_specification(element: ElementType, num_elements: int) -> None:
    content = np.random.default_rng(num_elements).bytes(num_elements * element.num_planes)
    expected = split_in_numpy(memoryview(content), element)
    found = planes.split(memoryview(content), element)
    assert [plane.tolist() for plane in found] == [plane.tolist() for plane in expected]
    out = np.zeros(len(content), np.uint8)
    planes.join(expected, element, out)
    assert out.tobytes() == content


def test_planes_are_packed_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    content = memoryview(normal(3 * STREAM_BYTES + 5, 3.0))
    with_library = SPECIFICATION.pack_frame(content, ElementType.F32)
    monkeypatch.setattr(planes, "NATIVE", None)
    without = SPECIFICATION.pack_frame(content, ElementType.F32)
    assert with_library == without
    out = bytearray(len(content))
    SPECIFICATION.unpack_frame(memoryview(without), ElementType.F32, memoryview(out))
    assert out == content


@pytest.mark.parametrize("name", ["planes-deflate/native", "planes-deflate/zlib"])
@pytest.mark.parametrize("element", ElementType, ids=lambda element: element.name)
def test_zlib_and_isal_inflate_our_streams_and_need_no_history(name: str, element: ElementType) -> None:
    content = normal((5 * STREAM_BYTES + 20 * KIB) * element.num_planes, 2.5)
    frame = codec_named(name).pack_frame(memoryview(content), element)
    streams = coded_streams(bytes(frame), element, len(content))
    assert len(streams) == 6 * element.num_planes
    for stream, size in streams:
        for inflate in (zlib.decompressobj(SMALLEST_WINDOW), isal_zlib.decompressobj(SMALLEST_WINDOW)):
            assert len(inflate.decompress(stream)) == size
            assert inflate.eof
            assert inflate.unused_data == b""
        assert zlib.decompress(stream, SMALLEST_WINDOW) == isal_zlib.decompress(stream, SMALLEST_WINDOW)


def skewed(num_symbols: int) -> bytes:
    """Fibonacci frequencies, which make Huffman codes as long as can be."""
    counts = [1, 1]
    while len(counts) < num_symbols:
        counts.append(counts[-1] + counts[-2])
    return b"".join(bytes([symbol]) * count for symbol, count in enumerate(counts))


@needs_native
@pytest.mark.parametrize(
    "content",
    [
        skewed(12), skewed(15), skewed(20), skewed(22), skewed(22)[:: -1],
        bytes(range(200)) * 400, bytes(range(256)) * 20 + bytes(8 * KIB),
        b"ab" * 40 * KIB, b"a" * (STREAM_BYTES - 1) + b"b", b"a" * STREAM_BYTES + b"b" * STREAM_BYTES,
        normal(STREAM_BYTES * 4 + 1, 1.0), normal(STREAM_BYTES * 9 - 1, 12.0), normal(500, 1.0), b"aab" * 30,
    ],
    ids=lambda content: f"{len(content)} bytes of {len(set(content))}",
)  # fmt: skip
def test_native_frames_read_back_here_and_by_zlib(content: bytes) -> None:
    native = codec_named("planes-deflate/native")
    frame = native.pack_frame(memoryview(content), ElementType.OTHER)
    assert frame is not None
    assert len(frame) < len(content)
    for codec in (native, SPECIFICATION):
        out = bytearray(len(content))
        codec.unpack_frame(memoryview(frame), ElementType.OTHER, memoryview(out))
        assert out == content, codec.name


@needs_native
@settings(max_examples=150)
@given(
    content=st.lists(st.tuples(st.integers(0, 255), st.integers(1, 3000)), max_size=60).map(
        lambda runs: b"".join(bytes([symbol]) * length for symbol, length in runs)
    ),
    element=st.sampled_from(ElementType),
)
def test_native_frames_of_any_frequencies_read_back_by_zlib(content: bytes, element: ElementType) -> None:
    frame = codec_named("planes-deflate/native").pack_frame(memoryview(content), element) if content else None
    if frame is not None:
        out = bytearray(len(content))
        SPECIFICATION.unpack_frame(memoryview(frame), element, memoryview(out))
        assert out == content


@needs_native
def test_the_native_library_itself_decodes_what_it_packs() -> None:
    """And does not leave it to another inflate, which would be right but slow."""
    for element in ElementType:
        content = np.frombuffer(normal(7 * STREAM_BYTES * element.num_planes + 3, 2.5), np.uint8)
        packed, out = np.empty(len(content), np.uint8), np.empty(len(content), np.uint8)
        length = NATIVE.pack_deflate(content, element, packed)
        assert 0 < length < len(content)
        assert NATIVE.unpack_deflate(packed[:length], element, out)
        assert out.tobytes() == content.tobytes()


@needs_native
@settings(max_examples=400)
@given(data=st.data())
def test_what_the_native_library_decodes_of_damaged_frames_is_what_zlib_decodes(data: st.DataObject) -> None:
    content = normal(data.draw(st.sampled_from([300, 4000, 5 * STREAM_BYTES])), 2.0)
    frame = bytearray(codec_named("planes-deflate/native").pack_frame(memoryview(content), ElementType.OTHER))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, 120) | st.integers(0, len(frame) - 1))
        frame[where % len(frame)] ^= 1 << data.draw(st.integers(0, 7))
    found, expected = np.zeros(len(content), np.uint8), bytearray(len(content))
    if NATIVE.unpack_deflate(np.frombuffer(frame, np.uint8), ElementType.OTHER, found):
        SPECIFICATION.unpack_frame(memoryview(frame), ElementType.OTHER, memoryview(expected))
        assert found.tobytes() == expected


@needs_native
def test_shapes_that_no_caller_has_are_refused_by_the_native_library() -> None:
    big = np.zeros(4 * 1024 * KIB + 1, np.uint8)
    assert NATIVE.pack_deflate(big, ElementType.OTHER, np.empty(10, np.uint8)) == -1
    assert not NATIVE.unpack_deflate(np.zeros(100, np.uint8), ElementType.OTHER, big)
