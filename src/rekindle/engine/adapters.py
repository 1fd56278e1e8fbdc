"""Resident adapters: bytes in the page pool, and the tables that tell kernels where each matrix lies.

A load runs on a reader thread straight into the adapter's mapped pages while steps go on; `wake` is called when it
ends, and the step loop collects the outcome with `finished`. Pages belong to the scheduler: it says which to fill and
when an adapter is evicted, and never while a step uses it.
"""

from __future__ import annotations

import logging
import os
import queue
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rekindle.engine.kernels.interface import LORA_FIELDS, PROJECTIONS, AdapterMatrices
from rekindle.engine.memory import MappedPages, PagePool
from rekindle.engine.scheduler.plan import AdapterLoad
from rekindle.errors import AdapterRejected
from rekindle.protocol.adapters import AdapterManifest, LoraBinding
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.safetensors_file import data_section

_logger = logging.getLogger(__name__)

_STAGED_ELEMENTS = 1 << 20
"""How much of a file in another dtype is held beside the pool while it is converted."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class EmbeddingUpdate:
    """A low-rank change of the input embedding: rows of A (by token) times B, scaled."""

    a_VR: torch.Tensor
    b_HR: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """One adapter in device memory."""

    manifest: AdapterManifest
    pages: MappedPages
    matrices: AdapterMatrices
    embedding: EmbeddingUpdate | None
    replaced_embedding_VH: torch.Tensor | None
    replaced_head_VH: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """A finished load; `error` is None if the adapter is ready."""

    digest: AdapterDigest
    error: str | None = None


class AdapterMemory:
    """Loads, keeps and evicts adapters in pool pages. All methods belong to the step loop's thread."""

    def __init__(self, pool: PagePool, num_layers: int, dtype: torch.dtype, wake: Callable[[], None]) -> None:
        self._pool, self._num_layers, self._dtype, self._wake = pool, num_layers, dtype, wake
        self._paths: dict[AdapterDigest, Path] = {}
        self._resident: dict[AdapterDigest, ResidentAdapter] = {}
        self._requests: queue.SimpleQueue[tuple[AdapterLoad, Path] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[LoadOutcome, ResidentAdapter | None]] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read_loop, name="adapter-reader", daemon=True)
        self._reader.start()

    def register(self, digest: AdapterDigest, path: Path) -> None:
        """Say where a version's file is."""
        self._paths[digest] = path

    def start_load(self, load: AdapterLoad) -> None:
        """Begin filling the pages of one adapter."""
        self._requests.put((load, self._paths[load.manifest.digest]))

    @property
    def has_finished(self) -> bool:
        """Whether `finished` has something to tell."""
        return not self._outcomes.empty()

    def finished(self) -> list[LoadOutcome]:
        """Loads that ended since the last call; successful ones are resident from now on."""
        outcomes = []
        while not self._outcomes.empty():
            outcome, adapter = self._outcomes.get()
            if adapter is not None:
                self._resident[outcome.digest] = adapter
            outcomes.append(outcome)
        return outcomes

    def get(self, digest: AdapterDigest) -> ResidentAdapter:
        """A resident adapter."""
        return self._resident[digest]

    def find(self, digest: AdapterDigest) -> ResidentAdapter | None:
        """An adapter, if it is resident."""
        return self._resident.get(digest)

    def evict(self, digest: AdapterDigest) -> None:
        """Unmap an adapter; its pages may be reused at once."""
        self._resident.pop(digest).pages.close()

    def resident(self) -> tuple[AdapterDigest, ...]:
        """Digests of all resident adapters."""
        return tuple(self._resident)

    def close(self) -> None:
        """Stop the reader and unmap everything."""
        self._requests.put(None)
        self._reader.join()
        for adapter in self._resident.values():
            adapter.pages.close()
        self._resident.clear()

    def _read_loop(self) -> None:
        while (request := self._requests.get()) is not None:
            load, path = request
            self._outcomes.put(self._load(load, path))
            self._wake()

    def _load(self, load: AdapterLoad, path: Path) -> tuple[LoadOutcome, ResidentAdapter | None]:
        """Whatever goes wrong is the fate of this load, and the reader goes on, hence the broad handlers."""
        digest = load.manifest.digest
        try:
            pages = self._pool.map_pages(load.pages)
            try:
                self._read(load.manifest, path, pages)
                return LoadOutcome(digest), self._resident_view(load.manifest, pages)
            except BaseException:
                pages.close()
                raise
        except Exception as failure:
            _logger.exception("adapter %s could not be loaded", digest)
            return LoadOutcome(digest, f"adapter {digest[:12]} could not be loaded: {failure}"), None

    def _read(self, manifest: AdapterManifest, path: Path, pages: MappedPages) -> None:
        stored, num_elements = _DTYPES[manifest.dtype], manifest.num_elements
        section = data_section(path)
        if section.num_bytes < num_elements * stored.itemsize:
            raise AdapterRejected(
                f"{path.name} holds {section.num_bytes} bytes of tensors, {num_elements * stored.itemsize} expected"
            )
        with path.open("rb", buffering=0) as file:
            if stored == self._dtype:
                target = memoryview(pages.buffer).cast("B")[: num_elements * stored.itemsize]
                _read_exactly(file.fileno(), target, section.offset)
                return
            staged = bytearray(_STAGED_ELEMENTS * stored.itemsize)
            for start in range(0, num_elements, _STAGED_ELEMENTS):
                count = min(_STAGED_ELEMENTS, num_elements - start)
                piece = memoryview(staged)[: count * stored.itemsize]
                _read_exactly(file.fileno(), piece, section.offset + start * stored.itemsize)
                pages.tensor(self._dtype, count, start).copy_(torch.frombuffer(piece, dtype=stored))

    def _resident_view(self, manifest: AdapterManifest, pages: MappedPages) -> ResidentAdapter:
        table_LPF = torch.zeros(self._num_layers + 1, len(PROJECTIONS), LORA_FIELDS, dtype=torch.int64)
        embedding = None
        for binding in manifest.bindings:
            if binding.projection == "embed_tokens":
                embedding = self._embedding(binding, pages)
                continue
            is_head = binding.projection == "lm_head"
            row = self._num_layers if is_head else binding.layer
            column = 0 if is_head else PROJECTIONS.index(binding.projection)
            table_LPF[row, column] = torch.tensor(_entry(binding))
        replaced = {
            matrix.projection: pages.tensor(self._dtype, matrix.rows * matrix.columns, matrix.offset).view(
                matrix.rows, matrix.columns
            )
            for matrix in manifest.replaced
        }
        matrices = AdapterMatrices(table_LPF, vector=pages.tensor(self._dtype, manifest.num_elements, 0))
        return ResidentAdapter(
            manifest, pages, matrices, embedding, replaced.get("embed_tokens"), replaced.get("lm_head")
        )

    def _embedding(self, binding: LoraBinding, pages: MappedPages) -> EmbeddingUpdate:
        rank = binding.rank
        a_VR = pages.tensor(self._dtype, binding.in_features * rank, binding.a_offset)
        b_HR = pages.tensor(self._dtype, binding.out_features * rank, binding.b_offset)
        return EmbeddingUpdate(
            a_VR.view(binding.in_features, rank), b_HR.view(binding.out_features, rank), binding.scale
        )


def _entry(binding: LoraBinding) -> list[int]:
    (scale_bits,) = struct.unpack("q", struct.pack("d", binding.scale))
    return [binding.a_offset, binding.b_offset, binding.rank, scale_bits]


def _read_exactly(fd: int, target: memoryview, offset: int) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            raise AdapterRejected(f"the adapter's file ends after {done} of {len(target)} bytes")
        done += count
