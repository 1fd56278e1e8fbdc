"""Loaders of weight files into host memory, ours and others', each as one function from a file to its tensors.

Loaders of packages that cannot be imported are left out. fastsafetensors and the Run:ai streamer are asked for host
memory, as all others are. ServerlessLLM's store (sllm-store) is not here: it loads into the memory of a GPU only,
through a server of its own.
"""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rekindle.bench.weight_files import WeightFiles, tensors_of
from rekindle.protocol.storage import StorageProfile
from rekindle.store.checksums import Checksums, read_checksums
from rekindle.store.reading import aligned_buffer, read_file

Tensors = Mapping[str, torch.Tensor]

OURS = "rekindle"


def _nothing() -> None:
    """What most loaders need done when their tensors are no longer used."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """Tensors that may be used until `close`."""

    tensors: Tensors
    close: Callable[[], None] = _nothing


@dataclass(frozen=True, slots=True)
class Loader:
    """Brings the tensors of the file at `path` into memory. `is_mapped` says whether `load` only maps pages, which come
    from the file when they are first touched."""

    name: str
    load: Callable[[], Loaded]
    path: Path
    is_mapped: bool = False


def loaders_of(files: WeightFiles, profile: StorageProfile) -> list[Loader]:
    """Every loader that works here, ours first."""
    path = files.safetensors
    reused = memoryview(aligned_buffer(files.num_bytes))
    reused[:] = bytes(len(reused))
    checksums = read_checksums(path)
    found = [
        Loader(OURS, lambda: _ours(path, profile, None, None), path),
        Loader(f"{OURS}, verified", lambda: _ours(path, profile, None, checksums), path),
        Loader(f"{OURS}, into used memory", lambda: _ours(path, profile, reused, None), path),
        Loader("torch.load", lambda: _torch_load(files.pytorch, is_mapped=False), files.pytorch),
        Loader("torch.load, mmap", lambda: _torch_load(files.pytorch, is_mapped=True), files.pytorch, is_mapped=True),
    ]
    if (module := _importable("safetensors.torch")) is not None:
        load_file = module.load_file
        found += [
            Loader("safetensors load_file", lambda: Loaded(load_file(path)), path, is_mapped=True),
            Loader("safetensors safe_open", lambda: _safe_open(path), path, is_mapped=True),
        ]
    if (fast := _importable("fastsafetensors")) is not None:
        found.append(Loader("fastsafetensors", lambda: _fastsafetensors(fast, path), path))
    if (streamer := _importable("runai_model_streamer")) is not None:
        found.append(Loader("runai-model-streamer", lambda: _runai(streamer, path), path))
    return found


def same(left: Tensors, right: Tensors) -> bool:
    """Whether both hold the same names and bits."""
    return left.keys() == right.keys() and all(
        left[name].shape == tensor.shape and torch.equal(left[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in right.items()
    )


def touch(tensors: Tensors) -> int:
    """Read one byte of every page of every tensor; returns their sum, so that it cannot be left out."""
    return sum(int(tensor.view(-1).view(torch.uint8).numpy()[:: mmap.PAGESIZE].sum()) for tensor in tensors.values())


def _ours(path: Path, profile: StorageProfile, buffer: memoryview | None, checksums: Checksums | None) -> Loaded:
    if buffer is None:
        buffer = memoryview(aligned_buffer(path.stat().st_size))
    num_bytes = read_file(path, buffer, profile=profile, verifier=checksums)
    return Loaded(tensors_of(buffer[:num_bytes], path.name))


def _torch_load(path: Path, *, is_mapped: bool) -> Loaded:
    return Loaded(torch.load(path, weights_only=True, mmap=is_mapped, map_location="cpu"))


def _safe_open(path: Path) -> Loaded:
    with importlib.import_module("safetensors").safe_open(path, framework="pt") as file:
        return Loaded({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 -- it is no mapping


def _fastsafetensors(module: Any, path: Path) -> Loaded:
    loader = module.SafeTensorsFileLoader(module.SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: [str(path)]})
    buffer = loader.copy_files_to_device()

    def close() -> None:
        buffer.close()
        loader.close()

    return Loaded({name: buffer.get_tensor(name) for name in loader.get_keys()}, close)


def _runai(module: Any, path: Path) -> Loaded:
    with module.SafetensorsStreamer() as streamer:
        streamer.stream_file(str(path))
        return Loaded(dict(streamer.get_tensors()))


def _importable(name: str) -> Any:
    """The module, or None if it or something it needs is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
