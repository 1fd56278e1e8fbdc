"""An adapter merged into the weights themselves, where these are the engine's own memory: on a GPU.

Merging overwrites W by W + sBA, computed in float32 and rounded once. Unmerging copies the store's bytes again and is
exact to the bit: nothing is ever subtracted from weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from rekindle.clock import Clock
from rekindle.engine.adapters import ResidentAdapter
from rekindle.engine.batch import Merged
from rekindle.engine.kernels.interface import AdapterMatrices
from rekindle.engine.merging import (
    Place,
    Unmergeable,
    first_rows,
    mapped_vector,
    merge_linear,
    mergeable_places,
    negated,
    place_tensors,
)
from rekindle.engine.models.decoder import Decoder
from rekindle.engine.scheduler.merging import MergeOutcome, MergeState
from rekindle.engine.weights import WeightSource
from rekindle.protocol.identity import AdapterDigest

_logger = logging.getLogger(__name__)


class InPlaceMerge:
    """Implements `Merging` by writing to `linears`, the weights [N, K] that `model` multiplies with, by place.

    They are private memory that nothing else reads: a head that is also the embedding is left out, and an adapter that
    changes it is refused. `base` has the bytes they were loaded from. `vector` gives the elements of a resident adapter
    side by side, on the device of `linears`.
    """

    def __init__(
        self,
        model: Decoder,
        base: WeightSource,
        linears: Mapping[Place, torch.Tensor],
        resident: Callable[[AdapterDigest], ResidentAdapter | None],
        clock: Clock,
        vector: Callable[[ResidentAdapter], torch.Tensor] = mapped_vector,
    ) -> None:
        self._model, self._base, self._linears = model, base, linears
        self._resident, self._clock, self._vector = resident, clock, vector
        self._merged: AdapterDigest | None = None
        self._written: list[Place] = []
        self._negated: tuple[ResidentAdapter, AdapterMatrices] | None = None
        self._outcomes: list[MergeOutcome] = []

    def prepare(self, digest: AdapterDigest | None) -> Merged | None:
        """Rewrite weights if another adapter is merged than this one, or none."""
        adapter = None if digest is None else self._resident(digest)
        if adapter is None or self._merged != digest:
            started_s = self._clock.monotonic_s()
            num_bytes = self._restore()
            if adapter is not None:
                self._merge(adapter, started_s, num_bytes)
        if adapter is None or self._merged is None:
            return None
        if self._negated is None or self._negated[0] is not adapter:
            self._negated = adapter, negated(adapter.matrices)
        changes_head = "lm_head" in adapter.manifest.targets
        return Merged(self._merged, self._model.weights, self._negated[1], changes_head)

    def advance(self, digest: AdapterDigest | None, step_s: float) -> list[MergeOutcome]:
        """All work is done in `prepare`; tells what became of it."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def forget(self, digest: AdapterDigest) -> None:
        """Its weights are restored by the next step, which no longer names it."""

    def _merge(self, adapter: ResidentAdapter, started_s: float, num_bytes: int) -> None:
        """A merge that fails leaves the base's weights as they were, hence the broad handler."""
        digest = adapter.manifest.digest
        try:
            num_bytes += self._write(adapter)
        except Exception as failure:
            self._restore()
            if not isinstance(failure, Unmergeable):
                _logger.exception("adapter %s could not be merged", digest)
            self._outcomes.append(MergeOutcome(digest, MergeState.REFUSED, reason=str(failure)))
            return
        self._merged = digest
        took_s = self._clock.monotonic_s() - started_s
        self._outcomes.append(MergeOutcome(digest, MergeState.READY, took_s, num_bytes))

    def _write(self, adapter: ResidentAdapter) -> int:
        num_bytes = 0
        arch = self._model.arch
        elements = self._vector(adapter)
        for place, bindings in mergeable_places(adapter.manifest, arch.num_layers).items():
            if place not in self._linears:
                raise Unmergeable(f"{bindings[0].module} has no weight of its own")
            weight_NK = self._linears[place]
            self._written.append(place)
            for _ in merge_linear(weight_NK, first_rows(place, bindings, arch), lambda: elements):
                pass
            num_bytes += weight_NK.nbytes
        return num_bytes

    def _restore(self) -> int:
        """Copy the store's bytes to every weight that was written; returns their number."""
        num_bytes = 0
        for place in self._written:
            weight_NK, _ = place_tensors(self._base, self._model.arch, place)
            self._linears[place].copy_(weight_NK)
            self._base.release_pages_of(weight_NK)
            num_bytes += weight_NK.nbytes
        self._written.clear()
        self._merged = None
        return num_bytes
