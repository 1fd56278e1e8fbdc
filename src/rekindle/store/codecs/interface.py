"""What a codec is: packing and unpacking of one frame.

A buffer is packed as independent frames of `FRAME_BYTES` (`rekindle.store.codecs.packed`); codecs see one frame at a
time and know nothing of the others. Codecs of one `Format` read each other's frames: they are backends, such as zlib
and ISA-L for DEFLATE.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from rekindle.store.safetensors_file import Bytes
from rekindle.units import MIB

FRAME_BYTES = 2 * MIB
"""Large enough that a frame's table entry and its turn in a thread pool cost nothing beside its decoding (0.5 ms);
small enough that two threads share an adapter of a few MiB evenly and that a frame and its planes fit the caches."""

FRAME_SIZES = (1 * MIB, 2 * MIB, 3 * MIB, 4 * MIB)
"""That a packed object may have; all are whole elements and whole streams."""


class Format(IntEnum):
    """What a frame's bytes mean. Values are part of the packed format."""

    RAW = 0
    LZ4 = 1
    ZSTD = 2
    BLOSC2 = 3
    ZSTD_PLANES = 4
    DEFLATE_PLANES = 5


class ElementType(IntEnum):
    """What codecs need to know of a dtype. Values are part of the packed format."""

    OTHER = 0
    BF16 = 1
    F16 = 2
    F32 = 3

    @staticmethod
    def of(dtype: str) -> ElementType:
        """By the name that safetensors gives a dtype; what has no planes of its own is OTHER, bytes."""
        return ElementType.__members__.get(dtype, ElementType.OTHER)

    @property
    def num_planes(self) -> int:
        """Bytes of an element."""
        return _NUM_PLANES[self]

    @property
    def exponent_straddles(self) -> bool:
        """Whether the exponent's eight bits begin after the sign and so lie in two bytes."""
        return self in (ElementType.BF16, ElementType.F32)


_NUM_PLANES = {ElementType.OTHER: 1, ElementType.BF16: 2, ElementType.F16: 2, ElementType.F32: 4}


class CodecUnavailable(Exception):
    """This codec cannot be had here; the text says why. Never leaves `rekindle.store.codecs`."""


class Codec(Protocol):
    """Packs and unpacks frames. Both methods may be called from several threads at once."""

    @property
    def name(self) -> str:
        """What reports call it: the format, and the backend where there are several."""

    @property
    def format(self) -> Format:
        """What its frames are."""

    def pack_frame(self, frame: memoryview, element: ElementType) -> Bytes | None:
        """The packed frame, or None where packing does not make it smaller. `frame` is not empty."""

    def unpack_frame(self, packed: memoryview, element: ElementType, out: memoryview) -> None:
        """Fill `out` with exactly its length of bytes.

        Raises:
            ValueError: `packed` is not a frame of this format, element type and length. `out` holds anything.
        """
