"""The codecs there are, and which of them work here.

Each codec proves itself once, before its first use, on a fixed pattern; one whose library is absent or that fails is
reported with the reason and not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from rekindle.errors import ConfigurationError
from rekindle.store.codecs.entropy import NativeDeflate, ZstdStreams, isal_streams, zlib_streams
from rekindle.store.codecs.general import BloscCodec, Lz4Codec, RawCodec, ZstdCodec
from rekindle.store.codecs.interface import FRAME_BYTES, Codec, CodecUnavailable, ElementType, Format
from rekindle.store.codecs.nvcomp import NvcompStreams
from rekindle.store.codecs.packed import open_packed, pack_into, packed_bound
from rekindle.store.codecs.planes import STREAM_BYTES, PlanesCodec, StreamCoder
from rekindle.store.codecs.qpl import qpl_streams

_Entry = tuple[str, Format, Callable[[], Codec]]


@dataclass(frozen=True, slots=True)
class Probed:
    """A codec that works here, or why it does not."""

    name: str
    format: Format
    codec: Codec | None
    reason: str = ""


def probed_codecs() -> tuple[Probed, ...]:
    """Every codec there is, those of one format fastest first."""
    return tuple(map(_probed, range(len(_CODECS))))


def codec_named(name: str) -> Codec:
    """A codec that works here.

    Raises:
        ConfigurationError: none has that name, or it does not work here.
    """
    for index, (known, _, _) in enumerate(_CODECS):
        if known == name:
            probed = _probed(index)
            if probed.codec is None:
                raise ConfigurationError(f"codec {name} cannot be used here: {probed.reason}")
            return probed.codec
    raise ConfigurationError(f"there is no codec {name!r}; known are {', '.join(name for name, _, _ in _CODECS)}")


def codec_for(format_: Format) -> Codec:
    """The fastest codec here that reads frames of a format; others are not even tried.

    Raises:
        ConfigurationError: none works here; the message gives each one's reason.
    """
    reasons = []
    for index, (_, known, _) in enumerate(_CODECS):
        if known is format_:
            probed = _probed(index)
            if probed.codec is not None:
                return probed.codec
            reasons.append(f"{probed.name}: {probed.reason}")
    raise ConfigurationError(f"nothing here reads packed objects of format {format_.name}: {'; '.join(reasons)}")


def probe(name: str, format_: Format, make: Callable[[], Codec]) -> Probed:
    """Make a codec and let it prove itself."""
    try:
        codec = make()
        _self_test(codec)
    except (CodecUnavailable, ConfigurationError) as error:
        return Probed(name, format_, None, str(error))
    except Exception as error:  # noqa: BLE001 - a foreign library may raise anything, and the others must be offered
        return Probed(name, format_, None, f"its self-test failed: {type(error).__name__}: {error}")
    return Probed(name, format_, codec)


def _self_test(codec: Codec) -> None:
    """A round trip of every element type: planes that gain, a constant one, noise, and lengths that do not come out."""
    draw = np.random.default_rng(7)
    weights = draw.normal(0, 0.02, STREAM_BYTES + 4097).astype("<f4")
    for element in ElementType:
        for content in (weights.tobytes() + b"\x01\x02\x03", bytes(FRAME_BYTES + 1), draw.bytes(9)):
            buffer = bytearray(packed_bound(len(content)))
            del buffer[pack_into(codec, content, element.name, buffer) :]
            out = bytearray(len(content))
            open_packed(buffer).unpack(codec, out)
            if out != content:
                raise CodecUnavailable(
                    f"its self-test failed: {len(content)} bytes of {element.name} came back changed"
                )


@cache
def _probed(index: int) -> Probed:
    return probe(*_CODECS[index])


def _planes_deflate(backend: str, make_streams: Callable[[], StreamCoder]) -> _Entry:
    name, format_ = f"planes-deflate/{backend}", Format.DEFLATE_PLANES
    return name, format_, lambda: PlanesCodec(name, format_, make_streams())


def _native_deflate() -> Codec:
    try:
        streams = isal_streams()
    except CodecUnavailable:
        streams = zlib_streams()
    return NativeDeflate(PlanesCodec("planes-deflate", Format.DEFLATE_PLANES, streams))


def _zstd_planes() -> Codec:
    return PlanesCodec("planes-zstd", Format.ZSTD_PLANES, ZstdStreams())


_CODECS: Sequence[_Entry] = (
    ("raw", Format.RAW, RawCodec),
    ("lz4", Format.LZ4, Lz4Codec),
    ("zstd", Format.ZSTD, ZstdCodec),
    ("blosc2-shuffle", Format.BLOSC2, partial(BloscCodec, "shuffle")),
    ("blosc2-bitshuffle", Format.BLOSC2, partial(BloscCodec, "bitshuffle")),
    ("planes-zstd", Format.ZSTD_PLANES, _zstd_planes),
    ("planes-deflate/native", Format.DEFLATE_PLANES, _native_deflate),
    _planes_deflate("qpl-iaa", partial(qpl_streams, "iaa")),
    _planes_deflate("isal", isal_streams),
    _planes_deflate("qpl-software", partial(qpl_streams, "software")),
    _planes_deflate("zlib", zlib_streams),
    _planes_deflate("nvcomp", NvcompStreams),
)
