"""Reading and writing of the safetensors format, header first.

Owns the layout of a file: eight bytes of header length, a JSON header, one data section without gaps. Files written
here are plain safetensors whose data section starts at a multiple of `DATA_ALIGNMENT_BYTES` (spaces at the header's end
make up the difference) and holds tensors in the order given, so that tensors used together are adjacent. Knows nothing
of models; tensors are streams of bytes and are never held whole.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any

from rekindle.errors import ModelRejected, RequestError
from rekindle.units import MIB, format_bytes

DATA_ALIGNMENT_BYTES = 4096
MAX_HEADER_BYTES = 100_000_000
"""The format's own bound."""

MAX_DIMENSIONS = 8
"""Of one tensor; models and adapters have two."""

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
"""Size of one element, by the format's name of its type."""

Bytes = bytes | bytearray | memoryview
"""Contiguous memory of any element type."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` bytes at `offset` from the start of the file, row-major."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class DataSection:
    """The bytes after the header."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TensorStream:
    """A tensor about to be written. `read` yields its bytes in order, in pieces of any size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterable[Bytes]]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A checked header: every entry lies inside the data section, and together they fill it without overlap."""

    entries: dict[str, TensorEntry]
    data: DataSection
    metadata: dict[str, str] = field(default_factory=dict)


def tensor_index(
    path: Path, *, rejected: type[RequestError] = ModelRejected, max_header_bytes: int = MAX_HEADER_BYTES
) -> dict[str, TensorEntry]:
    """The file's tensors by name, in the order of their bytes. Raises `rejected` as `read_header` does."""
    return read_header(path, rejected=rejected, max_header_bytes=max_header_bytes).entries


def read_header(
    path: Path, *, rejected: type[RequestError] = ModelRejected, max_header_bytes: int = MAX_HEADER_BYTES
) -> SafetensorsHeader:
    """Read and check a file's header; its tensors are not read.

    Raises:
        rejected: the file is truncated, longer than its header says, or its header is too long or not a valid one.
    """
    with path.open("rb") as file:
        raw = read_raw_header(file, path.name, rejected=rejected, max_header_bytes=max_header_bytes)
        file_bytes = os.fstat(file.fileno()).st_size
    return _checked_header(path.name, raw[8:], file_bytes, rejected)


def read_raw_header(
    file: IO[bytes],
    name: str,
    *,
    rejected: type[RequestError] = ModelRejected,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> bytes:
    """The bytes before the data section of a file open at its start: the header's length, and the header unchecked.

    Raises:
        rejected: the file is shorter than that, or its header is too long.
    """
    prefix = file.read(8)
    file_bytes = os.fstat(file.fileno()).st_size
    header_bytes = _header_length(name, prefix, file_bytes, rejected, max_header_bytes)
    return prefix + file.read(header_bytes)


def header_of(content: memoryview, name: str, *, rejected: type[RequestError] = ModelRejected) -> SafetensorsHeader:
    """As `read_header`, for a whole file that was read into memory; entries are places in `content`. `name` is for
    errors."""
    header_bytes = _header_length(name, bytes(content[:8]), len(content), rejected, MAX_HEADER_BYTES)
    return _checked_header(name, bytes(content[8 : 8 + header_bytes]), len(content), rejected)


def write_tensors(
    path: Path,
    tensors: Sequence[TensorStream],
    *,
    metadata: Mapping[str, str] | None = None,
    observe: Callable[[Bytes], None] | None = None,
) -> None:
    """Write a new file holding `tensors` in that order, one at a time.

    `observe` is given each piece of tensor bytes after it is written. The file is neither synced nor renamed.

    Raises:
        ValueError: a stream gave more or fewer bytes than its shape says, or a name occurs twice.
        FileExistsError: `path` exists.
    """
    with path.open("xb", buffering=MIB) as file:
        file.write(encode_header(tensors, metadata))
        for tensor in tensors:
            written = 0
            for piece in tensor.read():
                written += memoryview(piece).nbytes
                file.write(piece)
                if observe is not None:
                    observe(piece)
            if written != tensor.num_bytes:
                raise ValueError(f"{tensor.name} gave {written} bytes, its shape says {tensor.num_bytes}")


def encode_header(tensors: Sequence[TensorStream], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes before the data section, a multiple of `DATA_ALIGNMENT_BYTES` long."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in tensors:
        if tensor.name in header or tensor.name == "__metadata__":
            raise ValueError(f"tensor name {tensor.name!r} occurs twice")
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padding = -(8 + len(raw)) % DATA_ALIGNMENT_BYTES
    if len(raw) + padding > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {format_bytes(len(raw))} exceeds the format's {format_bytes(MAX_HEADER_BYTES)}")
    return (len(raw) + padding).to_bytes(8, "little") + raw + b" " * padding


def _header_length(
    name: str, prefix: bytes, file_bytes: int, rejected: type[RequestError], max_header_bytes: int
) -> int:
    if len(prefix) < 8:
        raise rejected(f"{name} is not a safetensors file: it holds {file_bytes} bytes")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > max_header_bytes:
        raise rejected(
            f"{name} is not a usable safetensors file: its header would be {header_bytes} bytes, "
            f"at most {max_header_bytes} are allowed"
        )
    if 8 + header_bytes > file_bytes:
        raise rejected(f"{name} is truncated: its header ends at {8 + header_bytes}, the file at {file_bytes}")
    return header_bytes


def _checked_header(name: str, raw: bytes, file_bytes: int, rejected: type[RequestError]) -> SafetensorsHeader:
    try:
        return _parse_header(raw, DataSection(8 + len(raw), file_bytes - 8 - len(raw)))
    except (ValueError, RecursionError) as error:
        raise rejected(f"{name}: {error}") from error


def _parse_header(raw: bytes, data: DataSection) -> SafetensorsHeader:
    header = json.loads(raw, object_pairs_hook=_unique_keys)
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("__metadata__ is not a JSON object")
    entries = sorted(
        ((name, _parse_entry(name, fields, data)) for name, fields in header.items()),
        key=lambda named: (named[1].offset, named[1].num_bytes),
    )
    end, before = data.offset, "the header"
    for name, entry in entries:
        if entry.offset != end:
            fault = "overlaps" if entry.offset < end else "leaves a gap after"
            raise ValueError(f"tensor {name} begins at byte {entry.offset} and {fault} {before}, which ends at {end}")
        end, before = entry.offset + entry.num_bytes, name
    if end != data.offset + data.num_bytes:
        raise ValueError(f"its tensors end at byte {end}, the file at {data.offset + data.num_bytes}")
    return SafetensorsHeader(dict(entries), data, metadata)


def _parse_entry(name: str, fields: Any, data: DataSection) -> TensorEntry:
    match fields:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(size) is int and size >= 0 for size in shape
        ):
            pass
        case _:
            raise ValueError(f"the header's entry for tensor {name} is malformed: {str(fields)[:200]}")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {name} has dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if not 0 <= begin <= end <= data.num_bytes:
        raise ValueError(
            f"tensor {name} lies at {begin}..{end}, outside its {data.num_bytes} bytes of data (truncated?)"
        )
    _check_shape(name, shape, data)
    expected = prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != expected:
        raise ValueError(f"tensor {name} of {dtype} {shape} needs {expected} bytes, its offsets span {end - begin}")
    return TensorEntry(dtype, tuple(shape), data.offset + begin, end - begin)


def _check_shape(name: str, shape: list[int], data: DataSection) -> None:
    """Refuse what no tensor of this file can have, before sizes of any length are multiplied."""
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are supported")
    if 0 not in shape and max(shape, default=0) > data.num_bytes:
        raise ValueError(
            f"tensor {name} has a dimension of {str(max(shape))[:40]}, the file only {data.num_bytes} bytes of data"
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{counts.most_common(1)[0][0]!r} occurs twice in the header")
    return unique
