"""A base model's tensors, from its file.

The file is mapped privately and copy-on-write: what the model uses as it is stored is a view, whose untouched pages are
shared with every other process that serves the model, and so is all that the page cache holds anyway. What is laid out
anew or brought to a device is only passed through, and comes through a `store.file_stream` where the page cache lacks
it. Either way it is compared with the file's checksums once, beside the work of laying it out.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from rekindle.engine.kernels.interface import Rows
from rekindle.engine.weight_reading import WeightReading
from rekindle.errors import ModelRejected
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.store.safetensors_file import TensorEntry, tensor_index
from rekindle.units import MIB

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_CPU = torch.device("cpu")
_BLOCK_BYTES = 16 * MIB
"""How much of a mapped tensor is passed on at once."""


class WeightSource(Protocol):
    """Where a model's tensors come from, by their Hugging Face names, in the compute dtype and on `device`."""

    device: torch.device
    dtype: torch.dtype

    def has(self, name: str) -> bool: ...

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, to keep."""
        ...

    def rows(self, names: Sequence[str]) -> Rows:
        """Tensors concatenated along their first dimension, yet to be brought."""
        ...

    def write(self, names: Sequence[str], target: torch.Tensor) -> None:
        """Bring tensors, concatenated along their first dimension, into memory that is there already."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """While the context lasts, all or most tensors are taken, in about the order of the file.

        Raises:
            StoredFileDamaged: something that was taken is not what was imported, at the context's end at the latest.
        """
        ...

    def release_pages(self) -> None:
        """Give back what was only needed while tensors were taken."""
        ...

    def release_pages_of(self, view: torch.Tensor) -> None:
        """As `release_pages`, for one tensor."""
        ...


class Weights:
    """Tensors of one safetensors file, converted to `dtype` and brought to `device` when they are read.

    Outside of `reading`, they come from the mapping and are not verified.

    Raises:
        ModelRejected: names in `expected` are missing, names in the file are left over, or shapes differ.
    """

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        expected: Mapping[str, tuple[int, ...]],
        device: torch.device = _CPU,
        profile: StorageProfile = DEFAULT_PROFILE,
    ) -> None:
        self._entries = check_tensors(path, expected)
        self.device, self.dtype = device, dtype
        self._path, self._profile = path, profile
        self._reading: WeightReading | None = None
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def has(self, name: str) -> bool:
        return name in self._entries

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor: a view of the file, or a copy if the dtype or the device differs."""
        return self.rows([name]).whole()

    def rows(self, names: Sequence[str]) -> Rows:
        """See `WeightSource`. As a whole, they are a view where the file stores them side by side."""
        return _StoredRows(self, tuple(self._entries[name] for name in names))

    def write(self, names: Sequence[str], target: torch.Tensor) -> None:
        row = 0
        for name in names:
            entry = self._entries[name]
            self._write((entry,), target[row : row + entry.shape[0]])
            row += entry.shape[0]
            self._release(entry.offset, entry.num_bytes)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `WeightSource`. Files without checksums are not verified.

        Raises:
            StoredFileDamaged: as there; at once if the file's length or its checksums themselves are damaged.
        """
        vectors = [
            (entry.offset, entry.offset + entry.num_bytes) for entry in self._entries.values() if _is_vector(entry)
        ]
        with WeightReading(self._path, memoryview(self._map), vectors, self._profile, self.device) as reading:
            self._reading = reading
            try:
                yield
                reading.wait()
            finally:
                self._reading = None

    def release_pages(self) -> None:
        """Let the kernel take back this process's mapped pages; they are read again from the file when touched."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def release_pages_of(self, view: torch.Tensor) -> None:
        """As `release_pages`, for the pages of one contiguous tensor; a copy is left alone."""
        start = view.data_ptr() - torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        if 0 <= start < len(self._map):
            self._release(start, view.nbytes)

    def whole_of(self, entries: Sequence[TensorEntry]) -> torch.Tensor:
        """Tensors concatenated along their first dimension: a view, or a copy if that cannot be."""
        if not _are_adjacent(entries) or (len(entries) > 1 and _is_vector(entries[0])):
            return torch.cat([self.whole_of([entry]) for entry in entries])
        first, begin = entries[0], entries[0].offset
        end = begin + sum(entry.num_bytes for entry in entries)
        if begin == end:
            return torch.empty(_shape_of(entries), dtype=self.dtype, device=self.device)
        if _is_vector(first):
            passed = None if self._reading is None else self._reading.vector(begin, end)
            return self._brought(self._kept(begin, end) if passed is None else passed, first)
        if self._is_used_in_place(first):
            return self._brought(self._kept(begin, end), first)
        whole = torch.empty(_shape_of(entries), dtype=self.dtype, device=self.device)
        self._write(entries, whole)
        return whole

    def blocks_of(self, entries: Sequence[TensorEntry], multiple: int) -> Iterator[torch.Tensor]:
        """The same in blocks of rows, each valid until the next; all but the last are a multiple of `multiple` rows."""
        begin, num_bytes = entries[0].offset, sum(entry.num_bytes for entry in entries)
        if not num_bytes or not _are_adjacent(entries):
            yield self.whole_of(entries)
            return
        unit_bytes = num_bytes // _shape_of(entries)[0] * multiple
        pieces = None if self._reading is None else self._reading.pieces(begin, begin + num_bytes, unit_bytes)
        for piece in pieces or self._mapped_pieces(begin, begin + num_bytes, unit_bytes):
            yield self._brought(piece, entries[0])

    def _write(self, entries: Sequence[TensorEntry], target: torch.Tensor) -> None:
        row = 0
        for block in self.blocks_of(entries, 1):
            target[row : row + len(block)].copy_(block)
            row += len(block)

    def _mapped_pieces(self, begin: int, end: int, unit_bytes: int) -> Iterator[memoryview]:
        length = max(_BLOCK_BYTES // unit_bytes, 1) * unit_bytes
        for first in range(begin, end, length):
            yield self._kept(first, min(first + length, end))

    def _kept(self, begin: int, end: int) -> memoryview:
        """A range of the mapping."""
        if self._reading is not None:
            self._reading.add_mapped(begin, end)
        return memoryview(self._map)[begin:end]

    def _is_used_in_place(self, entry: TensorEntry) -> bool:
        """Whether a view is what the model asks for."""
        return self.device.type == "cpu" and _DTYPES[entry.dtype] == self.dtype

    def _brought(self, stored: memoryview | bytearray, entry: TensorEntry) -> torch.Tensor:
        """Whole rows of the tensor, or all of it. The host does not wait for a device to take what is in pinned
        memory."""
        tensor = torch.frombuffer(stored, dtype=_DTYPES[entry.dtype])
        tensor = tensor.view(-1, *entry.shape[1:]) if entry.shape else tensor.view(())
        return tensor.to(self.device, non_blocking=True).to(self.dtype)

    def _release(self, begin: int, num_bytes: int) -> None:
        first = begin - begin % mmap.PAGESIZE
        if num_bytes:
            self._map.madvise(mmap.MADV_DONTNEED, first, begin + num_bytes - first)


@dataclass(frozen=True, slots=True)
class _StoredRows:
    """See `Rows` for the contract."""

    source: Weights
    entries: tuple[TensorEntry, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return _shape_of(self.entries)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def whole(self) -> torch.Tensor:
        return self.source.whole_of(self.entries)

    def blocks(self, multiple: int) -> Iterator[torch.Tensor]:
        return self.source.blocks_of(self.entries, multiple)


def check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    """The file's tensors by name, which are exactly those in `expected`; raises `ModelRejected` otherwise."""
    try:
        entries = tensor_index(path)
    except ModelRejected as error:
        raise ModelRejected(f"{path} cannot be used: {error}; remove the model and import it again") from error
    missing, left_over = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if missing or left_over:
        raise ModelRejected(
            f"{path.name} does not match its configuration; missing: {_listed(missing)}; "
            f"left over: {_listed(left_over)}"
        )
    for name, shape in expected.items():
        entry = entries[name]
        if tuple(entry.shape) != shape:
            raise ModelRejected(f"{name} has shape {list(entry.shape)}, its configuration says {list(shape)}")
        if entry.dtype not in _DTYPES:
            raise ModelRejected(f"{name} has dtype {entry.dtype}; supported: {', '.join(_DTYPES)}")
    return entries


def _is_vector(entry: TensorEntry) -> bool:
    """Whether a tensor is one of the small ones, which are taken out of the file's order."""
    return len(entry.shape) < 2


def _are_adjacent(entries: Sequence[TensorEntry]) -> bool:
    """Whether tensors lie side by side as one."""
    return all(
        after.offset == before.offset + before.num_bytes and after.dtype == before.dtype
        for before, after in itertools.pairwise(entries)
    )


def _shape_of(entries: Sequence[TensorEntry]) -> tuple[int, ...]:
    """Of tensors concatenated along their first dimension."""
    first = entries[0].shape
    return (sum(entry.shape[0] for entry in entries), *first[1:]) if first else ()


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
