"""Inflate on a GPU through nvCOMP: all streams of a frame in one batch.

Here the result comes back to host memory, so that what a GPU would decode is proven against the same bytes; a loader
that wants planes on the device keeps them there.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from rekindle.store.codecs.entropy import huffman_only
from rekindle.store.codecs.interface import CodecUnavailable
from rekindle.store.codecs.planes import STREAM_BYTES, Plane
from rekindle.store.safetensors_file import Bytes


class NvcompStreams:
    """Raw DEFLATE by nvCOMP on the first GPU; its codec objects belong to one thread each."""

    def __init__(self) -> None:
        try:
            from nvidia import nvcomp
        except ImportError as error:
            raise CodecUnavailable(f"nvCOMP cannot be imported: {error}") from error
        self._nvcomp = nvcomp
        self._of_thread = threading.local()

    def encode(self, stream: Plane) -> bytes:
        """See `StreamCoder`."""
        return huffman_only(stream)

    def decode(self, streams: Sequence[memoryview], sizes: Sequence[int]) -> Sequence[Bytes]:
        """See `StreamCoder`."""
        if not streams:
            return []
        arrays = [self._nvcomp.as_array(np.frombuffer(stream, np.uint8)).cuda() for stream in streams]
        try:
            plains = [np.asarray(array.cpu()).view(np.uint8).ravel() for array in self._codec().decode(arrays, "|u1")]
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        if [len(plain) for plain in plains] != list(sizes):
            raise ValueError(f"streams inflate to {[len(plain) for plain in plains]} bytes, not {list(sizes)}")
        return [plain.data for plain in plains]

    def _codec(self) -> Any:
        if not hasattr(self._of_thread, "codec"):
            self._of_thread.codec = self._nvcomp.Codec(
                algorithm="Deflate", bitstream_kind=self._nvcomp.BitstreamKind.RAW, uncomp_chunk_size=STREAM_BYTES
            )
        return self._of_thread.codec
