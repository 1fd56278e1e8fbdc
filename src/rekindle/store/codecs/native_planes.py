"""The native library of planes, called through ctypes, which releases the interpreter's lock meanwhile.

The library is compiled when the package is installed and optional: `NATIVE` is None without it, and `ABSENT` says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rekindle.store.codecs.interface import ElementType

_ADDRESS, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int

Octets = NDArray[np.uint8]


class NativePlanes:
    """One loaded library. Arrays must be contiguous and of the sizes said; nothing is checked here."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._split, self._join = library.rekindle_split, library.rekindle_join
        self._pack, self._unpack = library.rekindle_deflate_pack, library.rekindle_deflate_unpack
        self._split.argtypes = (_ADDRESS, _INT64, _INT, _INT, _ADDRESS)
        self._join.argtypes = (_ADDRESS, _INT64, _INT, _INT, _ADDRESS)
        self._split.restype = self._join.restype = None
        self._pack.argtypes = self._unpack.argtypes = (_ADDRESS, _INT64, _INT, _INT, _ADDRESS, _INT64)
        self._pack.restype, self._unpack.restype = _INT64, _INT

    def split(self, elements: Octets, element: ElementType, planes_PN: Octets) -> None:
        """Split whole elements into planes, which have one byte for each."""
        rows = (_ADDRESS * len(planes_PN))(*(row.ctypes.data for row in planes_PN))
        self._split(elements.ctypes.data, planes_PN.shape[1], *_shape(element), rows)

    def join(self, planes: Sequence[Octets], element: ElementType, elements: Octets) -> None:
        """Write the elements that `planes` make up."""
        rows = (_ADDRESS * len(planes))(*(plane.ctypes.data for plane in planes))
        self._join(rows, len(planes[0]), *_shape(element), elements.ctypes.data)

    def pack_deflate(self, frame: Octets, element: ElementType, packed: Octets) -> int:
        """Pack a frame into fewer bytes than `packed` has room for; returns how many, or -1."""
        return int(self._pack(frame.ctypes.data, len(frame), *_shape(element), packed.ctypes.data, len(packed)))

    def unpack_deflate(self, packed: Octets, element: ElementType, out: Octets) -> bool:
        """Unpack a frame, or say that it is damaged or holds DEFLATE that needs a full inflate."""
        return bool(self._unpack(packed.ctypes.data, len(packed), *_shape(element), out.ctypes.data, len(out)))


def _shape(element: ElementType) -> tuple[int, int]:
    return element.num_planes, int(element.exponent_straddles)


def _load() -> tuple[NativePlanes | None, str]:
    directory = Path(__file__).parent / "native"
    candidates = (directory / f"_planes{suffix}" for suffix in EXTENSION_SUFFIXES)
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        return None, "it was not compiled; it needs a C++ compiler when Rekindle is installed"
    try:
        return NativePlanes(ctypes.CDLL(str(path))), ""
    except OSError as error:
        return None, f"it cannot be loaded: {error}"


NATIVE, ABSENT = _load()
