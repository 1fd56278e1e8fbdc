"""Codecs that know nothing of floats, or leave that to Blosc2. Their libraries are imported when a codec is made."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from rekindle.store.codecs.interface import CodecUnavailable, ElementType, Format
from rekindle.store.safetensors_file import Bytes

_ZSTD_LEVEL = 3
_BLOSC_LEVEL = 1
"""Higher levels search longer for matches, which weights do not have."""


class RawCodec:
    """Bytes as they are, in frames with checksums."""

    name, format = "raw", Format.RAW

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        """See `Codec`."""
        return None

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        """See `Codec`."""
        raise ValueError("a raw frame is as long as what it unpacks to")


class Lz4Codec:
    """LZ4 blocks."""

    name, format = "lz4", Format.LZ4

    def __init__(self) -> None:
        try:
            from lz4 import block
        except ImportError as error:
            raise CodecUnavailable("the lz4 library is not installed") from error
        self._block = block

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        """See `Codec`."""
        packed: bytes = self._block.compress(frame, store_size=False)
        return packed if len(packed) < len(frame) else None

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        """See `Codec`."""
        try:
            _fill(out, self._block.decompress(packed, uncompressed_size=len(out)))
        except self._block.LZ4BlockError as error:
            raise ValueError(str(error)) from error


class ZstdCodec:
    """Whole frames by zstd."""

    name, format = "zstd", Format.ZSTD

    def __init__(self) -> None:
        self._zstd = Zstd(compression_level=_ZSTD_LEVEL)

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        """See `Codec`."""
        packed = self._zstd.compress(frame)
        return packed if len(packed) < len(frame) else None

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        """See `Codec`."""
        _fill(out, self._zstd.decompress(packed, len(out)))


class BloscCodec:
    """Blosc2: its own shuffle of bytes or of bits, then zstd. Keeps the interpreter's lock, so threads gain little."""

    format = Format.BLOSC2

    def __init__(self, filter_name: str) -> None:
        try:
            import blosc2
        except ImportError as error:
            raise CodecUnavailable("the blosc2 library is not installed") from error
        self.name = f"blosc2-{filter_name}"
        self._blosc2 = blosc2
        self._choices: dict[str, Any] = {
            "codec": blosc2.Codec.ZSTD,
            "clevel": _BLOSC_LEVEL,
            "filters": [blosc2.Filter[filter_name.upper()]],
            "filters_meta": [0],
            "splitmode": blosc2.SplitMode.ALWAYS_SPLIT,
            "nthreads": 1,
        }

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        """See `Codec`."""
        packed = self._blosc2.compress2(np.frombuffer(frame, np.uint8), typesize=element.num_planes, **self._choices)
        return packed if len(packed) < len(frame) else None

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        """See `Codec`."""
        try:
            num_bytes, packed_bytes, _ = self._blosc2.get_cbuffer_sizes(packed)
            if (num_bytes, packed_bytes) != (len(out), len(packed)):
                raise ValueError(f"it holds {num_bytes} bytes in {packed_bytes}, not {len(out)} in {len(packed)}")
            self._blosc2.decompress2(packed, dst=np.frombuffer(out, np.uint8), nthreads=1)
        except (RuntimeError, TypeError) as error:
            raise ValueError(str(error)) from error


class Zstd:
    """Contexts of the zstandard library, which belong to one thread each. `parameters` are those of zstd itself."""

    def __init__(self, **parameters: int) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise CodecUnavailable("the zstandard library is not installed") from error
        self._library = zstandard
        self._parameters = zstandard.ZstdCompressionParameters(write_content_size=True, **parameters)
        self._of_thread = threading.local()

    def compress(self, content: Any) -> bytes:
        """One zstd frame that says how long its content is."""
        if not hasattr(self._of_thread, "compressor"):
            self._of_thread.compressor = self._library.ZstdCompressor(compression_params=self._parameters)
        packed: bytes = self._of_thread.compressor.compress(content)
        return packed

    def decompress(self, packed: memoryview, num_bytes: int) -> bytes:
        """The content of one frame, `num_bytes` long.

        Raises:
            ValueError: it is damaged, or says another length.
        """
        if not hasattr(self._of_thread, "decompressor"):
            self._of_thread.decompressor = self._library.ZstdDecompressor()
        try:
            said = self._library.frame_content_size(packed)
            if said != num_bytes:
                raise ValueError(f"a zstd frame says it holds {said} bytes, not {num_bytes}")
            content: bytes = self._of_thread.decompressor.decompress(packed, allow_extra_data=False)
        except self._library.ZstdError as error:
            raise ValueError(str(error)) from error
        return content


def _fill(out: memoryview, content: bytes) -> None:
    if len(content) != len(out):
        raise ValueError(f"it unpacks to {len(content)} bytes, not {len(out)}")
    out[:] = content
