"""A model as an importer hands it over: configuration, tensors that can be streamed, and the files beside them.

Also the conversions between the three element types that are stored. numpy has no bfloat16; pieces of such tensors are
uint16 arrays holding its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rekindle.errors import ModelRejected

Piece = NDArray[Any]
"""Consecutive elements of a tensor, flat: float32, float16, or uint16 with the bits of bfloat16."""

PIECE_ELEMENTS = 1 << 22
"""How many elements a reader yields at a time."""

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}
"""Element types a model may be stored in, by their safetensors names."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor to import, by its Hugging Face name; `read` yields its elements in order, in `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Piece]]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to import.

    `config` is Hugging Face's config.json. `dtype` is the element type to store the model in. `files` maps names to
    contents: tokenizer.json, and where the source has them tokenizer_config.json, chat_template.jinja and
    generation_config.json.
    """

    config: dict[str, Any]
    dtype: str
    tensors: dict[str, SourceTensor]
    files: dict[str, bytes]


def common_dtype(matrix_dtypes: Iterable[str]) -> str:
    """The element type to store a model in: that of its matrices, or BF16 where they differ."""
    distinct = set(matrix_dtypes)
    return distinct.pop() if len(distinct) == 1 else "BF16"


def converted(tensor: SourceTensor, dtype: str) -> Iterator[memoryview]:
    """The tensor's bytes in `dtype`, rounded to nearest even.

    Raises:
        ModelRejected: a value is too large for `dtype`.
    """
    for piece in tensor.read():
        if tensor.dtype == dtype:
            result = np.ascontiguousarray(piece)
        else:
            result = _from_float32(_to_float32(piece, tensor.dtype), dtype, tensor.name)
        yield result.data


def _to_float32(piece: Piece, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (piece.astype(np.uint32) << 16).view(np.float32)
    return piece.astype(np.float32, copy=False)


def _from_float32(values: NDArray[np.float32], dtype: str, name: str) -> Piece:
    if dtype == "BF16":
        return _round_to_bfloat16(values)
    try:
        with np.errstate(over="raise"):
            return values.astype(NUMPY_DTYPES[dtype])
    except FloatingPointError as error:
        raise ModelRejected(f"{name} holds values too large for {dtype}; convert the model to BF16 first") from error


def _round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    result = rounded.astype(np.uint16)
    not_numbers = np.isnan(values)
    if not_numbers.any():
        result[not_numbers] = (bits[not_numbers] >> 16).astype(np.uint16) | np.uint16(0x40)
    return result
