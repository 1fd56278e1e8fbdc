"""A base model's tensors as views of its mapped file.

The file is mapped privately and copy-on-write, so untouched pages stay shared with every other process that serves the
model. Tensors stored side by side can be had as one fused view without a copy.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from rekindle.errors import ModelRejected
from rekindle.store.safetensors_file import TensorEntry, tensor_index
from rekindle.units import MIB

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_CPU = torch.device("cpu")
_WRITTEN_BYTES = 16 * MIB
"""How much is brought to the device at once to be written."""


class WeightSource(Protocol):
    """Where a model's tensors come from, by their Hugging Face names, in the compute dtype and on `device`."""

    device: torch.device
    dtype: torch.dtype

    def has(self, name: str) -> bool: ...

    def tensor(self, name: str) -> torch.Tensor: ...

    def fused(self, names: Sequence[str]) -> torch.Tensor:
        """Tensors concatenated along their first dimension."""
        ...

    def write(self, names: Sequence[str], target: torch.Tensor) -> None:
        """As `fused`, into memory that is there already."""
        ...

    def release_pages(self) -> None:
        """Give back what was only needed while tensors were taken."""
        ...

    def release_pages_of(self, view: torch.Tensor) -> None:
        """As `release_pages`, for one tensor."""
        ...


class Weights:
    """Tensors of one safetensors file, converted to `dtype` and brought to `device` when they are read.

    Raises:
        ModelRejected: names in `expected` are missing, names in the file are left over, or shapes differ.
    """

    def __init__(
        self, path: Path, dtype: torch.dtype, expected: Mapping[str, tuple[int, ...]], device: torch.device = _CPU
    ) -> None:
        self._entries = check_tensors(path, expected)
        self.device, self.dtype = device, dtype
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def has(self, name: str) -> bool:
        return name in self._entries

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor: a view of the file, or a copy if the dtype or the device differs."""
        entry = self._entries[name]
        return self._brought(self._view(entry.offset, entry).view(entry.shape))

    def fused(self, names: Sequence[str]) -> torch.Tensor:
        """Tensors concatenated along their first dimension: a view where the file stores them side by side."""
        entries = [self._entries[name] for name in names]
        adjacent = all(
            after.offset == before.offset + before.num_bytes for before, after in itertools.pairwise(entries)
        )
        if not adjacent:
            return torch.cat([self.tensor(name) for name in names])
        total = self._view(entries[0].offset, *entries)
        return self._brought(total.view(-1, *entries[0].shape[1:]))

    def write(self, names: Sequence[str], target: torch.Tensor) -> None:
        row = 0
        for name in names:
            entry = self._entries[name]
            stored = self._view(entry.offset, entry).view(entry.shape)
            rows_at_once = max(_WRITTEN_BYTES * len(stored) // stored.nbytes, 1)
            for first in range(0, len(stored), rows_at_once):
                part = stored[first : first + rows_at_once]
                target[row : row + len(part)] = self._brought(part)
                row += len(part)
            self.release_pages_of(stored)

    def release_pages(self) -> None:
        """Let the kernel take back this process's mapped pages; they are read again from the file when touched."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device).to(self.dtype)

    def release_pages_of(self, view: torch.Tensor) -> None:
        """As `release_pages`, for the pages of one contiguous tensor; a copy is left alone."""
        start = view.data_ptr() - torch.frombuffer(self._map, dtype=torch.uint8, count=1).data_ptr()
        if 0 <= start < len(self._map):
            first = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, start + view.nbytes - first)

    def _view(self, offset: int, *entries: TensorEntry) -> torch.Tensor:
        count = sum(entry.num_bytes for entry in entries) // _DTYPES[entries[0].dtype].itemsize
        return torch.frombuffer(self._map, dtype=_DTYPES[entries[0].dtype], count=count, offset=offset)


def check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    """The file's tensors by name, which are exactly those in `expected`; raises `ModelRejected` otherwise."""
    entries = tensor_index(path)
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


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
