"""Reading of the GGUF container: metadata and where the tensors lie.

Owns the container only; what metadata means is `gguf_config`'s and `gguf_tokenizer`'s business. The `gguf` library's
own reader is not used: it makes several array objects for each of a vocabulary's strings (seconds for a small model)
and checks no bounds. Its tables of quantised types are.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from rekindle.errors import ModelRejected

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT_BYTES = 32
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. `shape` is row-major; `rows` are its bytes, uint8 [rows, bytes of a row]."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    rows: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A GGUF file's metadata and tensors; tensor bytes are views of the mapped file."""

    name: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def open_gguf(path: Path) -> GgufFile:
    """Map a GGUF file and read its metadata.

    Raises:
        ModelRejected: the file is truncated, of another version or byte order, or malformed.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        metadata, tensors = _Parser(mapped).parse()
    except (ValueError, RecursionError, OverflowError) as error:
        raise ModelRejected(f"{path.name} is not a usable GGUF file: {error}") from error
    return GgufFile(path.name, metadata, tensors)


class _Parser:
    """One pass over the metadata. Every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._position = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} (or big-endian) is not supported; versions {_VERSIONS} are")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._string()
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT_BYTES)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment must be a positive integer, not {str(alignment)[:80]}")
        data_start = -(-self._position // alignment) * alignment
        tensors = {name: self._tensor(name, shape, kind, data_start + offset) for name, shape, kind, offset in infos}
        return metadata, tensors

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise ValueError(f"it is truncated: {count} bytes at {self._position} pass its end at {len(self._data)}")
        raw = self._data[self._position : end]
        self._position = end
        return raw

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind} before byte {self._position}")
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind in _SCALARS:
            item = np.dtype("<" + _SCALARS[item_kind])
            return np.frombuffer(self._take(count * item.itemsize), item).tolist()
        return [self._value(item_kind) for _ in range(count)]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, num_dimensions = self._string(), self._scalar("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {num_dimensions} dimensions; 1 to {_MAX_DIMENSIONS} are supported")
        dimensions = struct.unpack(f"<{num_dimensions}Q", self._take(8 * num_dimensions))
        kind = GGMLQuantizationType(self._scalar("I"))
        return name, dimensions[::-1], kind, self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int) -> GgufTensor:
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        columns = shape[-1] if shape else 1
        if columns % block_elements:
            raise ValueError(f"{name} has rows of {columns}, not a multiple of {kind.name}'s block of {block_elements}")
        row_bytes, num_rows = columns // block_elements * block_bytes, prod(shape[:-1])
        end = offset + num_rows * row_bytes
        if end > len(self._data):
            raise ValueError(f"it is truncated: {name} ends at byte {end}, the file at {len(self._data)}")
        flat = np.frombuffer(self._data, np.uint8, count=num_rows * row_bytes, offset=offset)
        return GgufTensor(name, kind, shape, flat.reshape(num_rows, row_bytes))
