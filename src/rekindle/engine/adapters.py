"""Resident adapters: their vectors in the page pool, and the tables that tell kernels where each matrix lies.

A load runs on a reader thread straight into the adapter's pages while steps go on; `wake` is called when it ends, and
the step loop collects the outcome with `finished`. Pages belong to the scheduler: it says which to fill and when an
adapter is evicted, and never while a step uses it.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from rekindle.clock import Clock
from rekindle.engine.adapter_sources import AdapterSources
from rekindle.engine.kernels.interface import LORA_FIELDS, PROJECTIONS, AdapterMatrices
from rekindle.engine.scheduler.plan import AdapterLoad
from rekindle.engine.vectors import AdapterVector
from rekindle.pace import Pace
from rekindle.policy.load_queue import LoadTiming
from rekindle.protocol.adapters import AdapterManifest, LoraBinding, ReplacedMatrix
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.vector_sources import VectorSource

_logger = logging.getLogger(__name__)


class VectorLoader(Protocol):
    """The part of a device's memory that adapters come through."""

    @property
    def pace(self) -> Pace:
        """What loads keep to."""
        ...

    def fence(self) -> object:
        """A mark after all work that has been given to the device; called by the step loop."""
        ...

    def give_way(self, is_busy: bool) -> None:
        """Whether steps run from now on, which loads are not to delay; called by the step loop."""
        ...

    def load(
        self, manifest: AdapterManifest, pages: Sequence[int], source: VectorSource, fence: object
    ) -> AdapterVector:
        """Fill the pages, once the work before `fence` has ended; called by the reader thread. Raises as `source`."""
        ...


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """One adapter in device memory: its low-rank updates by layer, of the embedding if any, and the matrices it
    replaces."""

    manifest: AdapterManifest
    vector: AdapterVector
    matrices: AdapterMatrices
    embedding: LoraBinding | None
    replaced_embedding: ReplacedMatrix | None
    replaced_head: ReplacedMatrix | None

    @property
    def changes_head(self) -> bool:
        return "lm_head" in self.manifest.targets


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """A finished load; `error` is None if the adapter is ready, `timing` is known to the reader."""

    digest: AdapterDigest
    error: str | None = None
    timing: LoadTiming | None = None


class AdapterMemory:
    """Loads, keeps and evicts adapters in pool pages. All methods belong to the step loop's thread."""

    def __init__(
        self, loader: VectorLoader, sources: AdapterSources, num_layers: int, wake: Callable[[], None], clock: Clock
    ) -> None:
        self._loader, self._sources, self._num_layers = loader, sources, num_layers
        self._wake, self._clock = wake, clock
        self._resident: dict[AdapterDigest, ResidentAdapter] = {}
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[LoadOutcome, ResidentAdapter | None]] = queue.SimpleQueue()
        self._is_closing = False
        self._reader = threading.Thread(target=self._read_loop, name="adapter-reader", daemon=True)
        self._reader.start()

    def start_load(self, load: AdapterLoad) -> None:
        """Begin filling the pages of one adapter."""
        fence = self._loader.fence()
        asked_s = self._clock.monotonic_s()
        self._work.put(lambda: None if self._is_closing else self._timed_load(load, fence, asked_s))

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
        """Forget an adapter's bytes; its pages may be reused at once.

        The reader unmaps it: entries of a page table are many, and a step would wait.
        """
        self._work.put(partial(self._let_go, digest, self._resident.pop(digest).vector))

    def resident(self) -> tuple[AdapterDigest, ...]:
        """Digests of all resident adapters."""
        return tuple(self._resident)

    def close(self) -> None:
        """Stop the reader, after the load it is at, and forget everything."""
        self._is_closing = True
        self._work.put(None)
        self._reader.join()
        self.finished()
        for digest, adapter in self._resident.items():
            self._let_go(digest, adapter.vector)
        self._resident.clear()
        self._sources.close()

    def _let_go(self, digest: AdapterDigest, vector: AdapterVector) -> None:
        vector.close()
        self._sources.let_go(digest)

    def _read_loop(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    def _timed_load(self, load: AdapterLoad, fence: object, asked_s: float) -> None:
        started_s = self._clock.monotonic_s()
        outcome, adapter = self._load(load, fence)
        timing = LoadTiming(started_s - asked_s, self._clock.monotonic_s() - started_s)
        self._outcomes.put((replace(outcome, timing=timing), adapter))
        self._wake()

    def _load(self, load: AdapterLoad, fence: object) -> tuple[LoadOutcome, ResidentAdapter | None]:
        """Whatever goes wrong is the fate of this load, and the reader goes on, hence the broad handler."""
        manifest = load.manifest
        try:
            vector = self._sources.bring(
                manifest, Path(load.path), lambda source: self._loader.load(manifest, load.pages, source, fence)
            )
            try:
                return LoadOutcome(manifest.digest), self._resident_view(manifest, vector)
            except BaseException:
                self._let_go(manifest.digest, vector)
                raise
        except Exception as failure:
            _logger.exception("adapter %s could not be loaded", manifest.digest)
            return LoadOutcome(manifest.digest, f"adapter {manifest.digest[:12]} could not be loaded: {failure}"), None

    def _resident_view(self, manifest: AdapterManifest, vector: AdapterVector) -> ResidentAdapter:
        table = [[[0] * LORA_FIELDS for _ in PROJECTIONS] for _ in range(self._num_layers + 1)]
        embedding = None
        for binding in manifest.bindings:
            if binding.projection == "embed_tokens":
                embedding = binding
                continue
            is_head = binding.projection == "lm_head"
            row = self._num_layers if is_head else binding.layer
            column = 0 if is_head else PROJECTIONS.index(binding.projection)
            table[row][column] = _entry(binding)
        replaced = {matrix.projection: matrix for matrix in manifest.replaced}
        return ResidentAdapter(
            manifest,
            vector,
            vector.matrices(torch.tensor(table)),
            embedding,
            replaced.get("embed_tokens"),
            replaced.get("lm_head"),
        )


def _entry(binding: LoraBinding) -> list[int]:
    (scale_bits,) = struct.unpack("q", struct.pack("d", binding.scale))
    return [binding.a_offset, binding.b_offset, binding.rank, scale_bits]
