"""Packed objects: every codec gives back every byte, and damage anywhere is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.errors import InternalError, PackedDamaged
from rekindle.store.codecs.general import RawCodec
from rekindle.store.codecs.interface import FRAME_BYTES, Codec, ElementType, Format
from rekindle.store.codecs.packed import open_packed, pack_into, packed_bound
from rekindle.store.codecs.registry import codec_for, codec_named, probed_codecs
from rekindle.store.safetensors_file import Bytes
from rekindle.units import KIB, MIB

CODECS = [probed.codec for probed in probed_codecs() if probed.codec is not None]
DTYPES = ["BF16", "F16", "F32", "F8_E4M3", "I64"]
HEADER_BYTES = 48
SMALL_FRAME = MIB

each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def weights(num_bytes: int, dtype: str = "BF16", seed: int = 0) -> bytes:
    """Normal weights, as bytes of the dtype; the last element may be cut."""
    values = np.random.default_rng(seed).normal(0, 0.02, num_bytes // 2 + 1).astype("<f4")
    if dtype == "F16":
        return values.astype("<f2").tobytes()[:num_bytes]
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()[:num_bytes]
    return values.tobytes()[:num_bytes]


def specials(num_bytes: int, dtype: str) -> bytes:
    """Both zeros, infinities, several NaNs, subnormals and the extremes, over and over."""
    patterns = {
        "BF16": np.array([0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 1, 0x807F, 0x7F7F], "<u2"),
        "F16": np.array([0, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF, 1, 0x83FF, 0x7BFF], "<u2"),
    }
    pattern = patterns.get(dtype, np.array([0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 1], "<u4"))
    return (pattern.tobytes() * (num_bytes // pattern.nbytes + 1))[:num_bytes]


def make_content(kind: str, num_bytes: int, dtype: str) -> bytes:
    if kind == "weights":
        return weights(num_bytes, dtype)
    if kind == "specials":
        return specials(num_bytes, dtype)
    if kind == "zeros":
        return bytes(num_bytes)
    noise = np.random.default_rng(1).bytes(num_bytes)
    # Half weights, half noise: planes of which some streams gain and some do not.
    return noise if kind == "noise" else weights(num_bytes // 2, dtype) + noise[num_bytes // 2 :]


def packed(
    codec: Codec,
    content: Bytes,
    dtype: str,
    executor: ThreadPoolExecutor | None = None,
    frame_bytes: int = SMALL_FRAME,
) -> bytearray:
    buffer = bytearray(packed_bound(len(content), frame_bytes))
    del buffer[pack_into(codec, content, dtype, buffer, executor, frame_bytes) :]
    return buffer


def unpacked(codec: Codec, buffer: Bytes, executor: ThreadPoolExecutor | None = None) -> bytes:
    found = open_packed(buffer)
    out = bytearray(found.num_bytes)
    found.unpack(codec, out, executor)
    return bytes(out)


edges = st.sampled_from([0, 64 * KIB, 128 * KIB, 256 * KIB, SMALL_FRAME, 2 * SMALL_FRAME])
sizes = st.builds(lambda edge, off: max(0, edge + off), edges, st.integers(-9, 9)) | st.integers(0, 3 * SMALL_FRAME)


@each_codec
@settings(max_examples=15)
@given(
    num_bytes=sizes,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["weights", "specials", "zeros", "noise", "mixed"]),
)
def test_every_codec_gives_back_every_byte(codec: Codec, num_bytes: int, dtype: str, kind: str) -> None:
    content = make_content(kind, num_bytes, dtype)
    buffer = packed(codec, content, dtype)
    assert len(buffer) <= packed_bound(num_bytes, SMALL_FRAME)
    assert unpacked(codec, buffer) == content


@each_codec
@settings(max_examples=25)
@given(content=st.binary(max_size=80), dtype=st.sampled_from(DTYPES))
def test_a_few_bytes_of_anything_come_back(codec: Codec, content: bytes, dtype: str) -> None:
    assert unpacked(codec, packed(codec, content, dtype)) == content


@each_codec
def test_threads_pack_and_unpack_the_same_bytes(codec: Codec, threads: ThreadPoolExecutor) -> None:
    content = weights(5 * SMALL_FRAME + 3)
    buffer = packed(codec, content, "BF16", threads)
    assert buffer == packed(codec, content, "BF16")
    assert unpacked(codec, buffer, threads) == content


def test_codecs_of_one_format_read_each_other() -> None:
    content = weights(SMALL_FRAME + 70 * KIB + 1) + bytes(300) + specials(64 * KIB, "BF16")
    for writer in CODECS:
        buffer = packed(writer, content, "BF16")
        for reader in CODECS:
            if reader.format is writer.format:
                assert unpacked(reader, buffer) == content, (writer.name, reader.name)


def test_frames_can_be_unpacked_alone_and_in_any_order() -> None:
    content = weights(3 * SMALL_FRAME + 11, "F32")
    codec = codec_for(Format.DEFLATE_PLANES)
    found = open_packed(packed(codec, content, "F32"))
    for index in (3, 1, 0, 2):
        expected = content[index * SMALL_FRAME : (index + 1) * SMALL_FRAME]
        out = bytearray(len(expected))
        found.unpack_frame(codec, index, memoryview(out))
        assert out == expected


@each_codec
def test_noise_takes_no_more_than_its_own_bytes_and_the_table(codec: Codec) -> None:
    content = np.random.default_rng(3).bytes(2 * SMALL_FRAME + 5)
    buffer = packed(codec, content, "F8_E4M3")
    assert buffer[-len(content) :] == content
    assert all(frame.packed_bytes == frame.unpacked_bytes for frame in open_packed(buffer).frames)


def test_bf16_weights_pack_to_two_thirds() -> None:
    """The order-0 entropy of normal weights' exponents bounds it by 0.66."""
    content = weights(4 * FRAME_BYTES)
    for name in ("planes-deflate/native", "planes-deflate/zlib"):
        assert len(packed(codec_named(name), content, "BF16")) < 0.67 * len(content)


def test_constant_weights_pack_to_next_to_nothing() -> None:
    buffer = packed(codec_for(Format.DEFLATE_PLANES), bytes(4 * FRAME_BYTES), "BF16")
    assert len(buffer) < 2 * KIB


@settings(max_examples=300)
@given(data=st.data())
def test_a_changed_byte_anywhere_is_told(data: st.DataObject) -> None:
    codec = codec_for(Format.DEFLATE_PLANES)
    content = weights(40 * KIB) + bytes(2 * KIB)
    buffer = packed(codec, content, "BF16")
    regions = st.integers(0, HEADER_BYTES + 24 - 1) | st.integers(0, len(buffer) - 1)
    buffer[data.draw(regions)] ^= data.draw(st.integers(1, 255))
    with pytest.raises(PackedDamaged):
        unpacked(codec, buffer)


@pytest.mark.parametrize("keep", [0, 1, 7, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 47, -1])
def test_a_cut_object_is_told(keep: int) -> None:
    buffer = packed(RawCodec(), weights(SMALL_FRAME + 10), "BF16")
    with pytest.raises(PackedDamaged):
        open_packed(buffer[:keep])


def test_an_object_with_bytes_after_its_end_is_told() -> None:
    with pytest.raises(PackedDamaged, match="header says"):
        open_packed(packed(RawCodec(), b"abc", "BF16") + b"\0")


def test_an_object_torn_between_two_writes_is_told() -> None:
    codec = codec_for(Format.DEFLATE_PLANES)
    old, new = (packed(codec, weights(2 * SMALL_FRAME, seed=seed), "BF16") for seed in (1, 2))
    torn = new[: SMALL_FRAME // 2] + old[SMALL_FRAME // 2 :][: len(new) - SMALL_FRAME // 2]
    torn += bytes(len(new) - len(torn))
    with pytest.raises(PackedDamaged):
        unpacked(codec, torn)


def resealed(buffer: bytearray, num_frames: int) -> bytearray:
    """The buffer with a checksum that agrees with its header and table, whatever these say."""
    table = buffer[HEADER_BYTES : HEADER_BYTES + 24 * num_frames]
    digest = xxhash.xxh3_64_intdigest(bytes(buffer[: HEADER_BYTES - 8]) + bytes(table))
    buffer[HEADER_BYTES - 8 : HEADER_BYTES] = digest.to_bytes(8, "little")
    return buffer


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (8, 2, 2),  # version
        (10, 1, 99),  # format
        (11, 1, 99),  # element type
        (12, 4, 0),  # frame bytes
        (12, 4, 8 * MIB),
        (12, 4, MIB + 4),
        (16, 8, 2**40),  # number of frames
        (24, 8, 10**15),  # bytes unpacked
        (32, 8, 0),  # bytes packed
        (48, 8, 2**63),  # first frame's offset
        (48, 8, 0),
        (56, 4, 0),  # its packed bytes
        (56, 4, 2**32 - 1),
        (60, 4, 1),  # its unpacked bytes
        (72 + 8, 4, 2 * MIB),  # the second's packed bytes
        (72 + 12, 4, 2**32 - 1),
    ],
)
def test_a_table_that_contradicts_itself_is_told_even_with_a_right_checksum(offset: int, size: int, value: int) -> None:
    buffer = packed(RawCodec(), weights(SMALL_FRAME + 10), "BF16")
    buffer[offset : offset + size] = value.to_bytes(size, "little")
    with pytest.raises(PackedDamaged):
        open_packed(resealed(buffer, 2))


@each_codec
@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_frame_never_crashes_its_decoder(codec: Codec, data: st.DataObject) -> None:
    """Past the checksum, such as by memory that changes between the check and its use."""
    content = data.draw(st.sampled_from([weights(70 * KIB), specials(9 * KIB, "BF16"), weights(300)]))
    frame = codec.pack_frame(memoryview(content), ElementType.BF16) or content
    body = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, min(len(body), 200) - 1) | st.integers(0, len(body) - 1))] ^= data.draw(
            st.integers(1, 255)
        )
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body) - 1)) :]
    out = bytearray(len(content) + 64)
    out[len(content) :] = b"\xa5" * 64
    with suppress(ValueError):
        codec.unpack_frame(memoryview(body), ElementType.BF16, memoryview(out)[: len(content)])
    assert out[len(content) :] == b"\xa5" * 64


class _Scripted:
    """Frame 0 fails at once; the others take their time."""

    name, format = "scripted", Format.ZSTD

    def __init__(self) -> None:
        self.running = 0
        self.started = threading.Event()
        self._lock = threading.Lock()

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        return bytes(frame[:8])

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        if packed[0] == 0:
            assert self.started.wait(10)
            raise ValueError("as told")
        with self._lock:
            self.running += 1
        self.started.set()
        for at in range(0, len(out), 4096):
            out[at] = 1
        with self._lock:
            self.running -= 1


def test_nothing_writes_to_the_buffer_once_unpacking_has_failed(threads: ThreadPoolExecutor) -> None:
    codec = _Scripted()
    content = b"".join(bytes([index]) * SMALL_FRAME for index in range(8))
    found = open_packed(packed(codec, content, "BF16"))
    with pytest.raises(PackedDamaged, match="frame 0 of a packed object is whole but scripted cannot unpack it"):
        found.unpack(codec, bytearray(len(content)), threads)
    assert codec.running == 0


def test_buffers_and_codecs_that_do_not_belong_together_are_refused() -> None:
    found = open_packed(packed(RawCodec(), b"abcd", "BF16"))
    with pytest.raises(InternalError, match="4 bytes was to be unpacked into 3"):
        found.unpack(RawCodec(), bytearray(3))
    with pytest.raises(InternalError, match="unpack frames of RAW"):
        found.unpack(codec_for(Format.DEFLATE_PLANES), bytearray(4))
    with pytest.raises(InternalError, match="the buffer has 1"):
        pack_into(RawCodec(), b"abcd", "BF16", bytearray(1))
    with pytest.raises(InternalError, match="frames of 4096 bytes"):
        pack_into(RawCodec(), b"abcd", "BF16", bytearray(10**4), frame_bytes=4096)
