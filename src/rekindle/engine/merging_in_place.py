"""An adapter merged into the weights themselves, where these are the engine's own memory: on a GPU.

Merging overwrites W by W + sBA, computed in float32 and rounded once. Unmerging copies the store's bytes again and is
exact to the bit: nothing is ever subtracted from weights. All is done between two steps, which wait for it, and at the
addresses that recorded steps read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from rekindle.clock import Clock
from rekindle.engine.adapters import ResidentAdapter
from rekindle.engine.batch import Merged
from rekindle.engine.kernels.interface import AdapterMatrices
from rekindle.engine.kernels.linear import PlainLinear
from rekindle.engine.merging import (
    HEAD,
    Place,
    Unmergeable,
    first_rows,
    merge_linear,
    mergeable_places,
    negated,
)
from rekindle.engine.models.architecture import Architecture
from rekindle.engine.models.decoder import LINEARS, Decoder, head_name, linear_names
from rekindle.engine.scheduler.merging import MergeOutcome, MergeState
from rekindle.engine.weights import WeightSource
from rekindle.protocol.identity import AdapterDigest

_logger = logging.getLogger(__name__)

_PIECE_ELEMENTS = 1 << 24
"""Weights computed at once: enough to occupy a GPU, and 64 MiB of float32 beside them."""


def own_linears(model: Decoder) -> dict[Place, torch.Tensor]:
    """The weights that can be written, which are those that a model multiplies with as they are stored. A head that is
    also the embedding is left out."""
    weights = model.weights
    linears = {(i, name): getattr(layer, name) for i, layer in enumerate(weights.layers) for name in LINEARS}
    if not model.arch.tied_embeddings:
        linears[len(weights.layers), HEAD] = weights.head
    return {place: linear.weight_NK for place, linear in linears.items() if isinstance(linear, PlainLinear)}


class InPlaceMerge:
    """Implements `Merging` by writing to `linears`, weights [N, K] that `model` multiplies with, by place; see
    `own_linears`. They are private memory that nothing else reads, and an adapter that changes others is refused.
    `base` has the bytes they were loaded from.
    """

    def __init__(
        self,
        model: Decoder,
        base: WeightSource,
        linears: Mapping[Place, torch.Tensor],
        resident: Callable[[AdapterDigest], ResidentAdapter | None],
        clock: Clock,
    ) -> None:
        self._model, self._base, self._linears = model, base, linears
        self._resident, self._clock = resident, clock
        self._merged: AdapterDigest | None = None
        self._written: list[Place] = []
        self._negated: tuple[ResidentAdapter, AdapterMatrices] | None = None
        self._outcomes: list[MergeOutcome] = []

    def prepare(self, digest: AdapterDigest | None) -> Merged | None:
        """Rewrite weights if another adapter is merged than this one, or none."""
        adapter = None if digest is None else self._resident(digest)
        if adapter is None or self._merged != digest:
            self._leave()
            if adapter is not None:
                self._merge(adapter)
        if adapter is None or self._merged is None:
            self._negated = None
            return None
        if self._negated is None or self._negated[0] is not adapter:
            self._negated = adapter, negated(adapter.matrices)
        changes_head = "lm_head" in adapter.manifest.targets
        return Merged(self._merged, None, self._negated[1], changes_head)

    def advance(self, digest: AdapterDigest | None, step_s: float) -> list[MergeOutcome]:
        """All work is done in `prepare`; tells what became of it."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def forget(self, digest: AdapterDigest) -> None:
        """Its weights are restored by the next step, which no longer names it."""

    def _merge(self, adapter: ResidentAdapter) -> None:
        """A merge that fails leaves the base's weights as they were, hence the broad handler."""
        digest = adapter.manifest.digest
        started_s = self._clock.monotonic_s()
        try:
            num_bytes = self._write(adapter)
        except Exception as failure:
            self._restore()
            if isinstance(failure, Unmergeable):
                _logger.info("adapter %s is never merged: %s", digest, failure)
            else:
                _logger.exception("adapter %s could not be merged", digest)
            self._outcomes.append(MergeOutcome(digest, MergeState.REFUSED, reason=str(failure)))
            return
        self._merged = digest
        took_s = self._clock.monotonic_s() - started_s
        self._outcomes.append(MergeOutcome(digest, MergeState.READY, took_s, num_bytes))

    def _leave(self) -> None:
        digest, started_s = self._merged, self._clock.monotonic_s()
        num_bytes = self._restore()
        if digest is not None:
            took_s = self._clock.monotonic_s() - started_s
            self._outcomes.append(MergeOutcome(digest, MergeState.RESTORED, took_s, num_bytes))

    def _write(self, adapter: ResidentAdapter) -> int:
        num_bytes = 0
        arch = self._model.arch
        places = mergeable_places(adapter.manifest, arch.num_layers)
        if not places:
            raise Unmergeable("it changes no linear layer")
        for place, bindings in places.items():
            if place not in self._linears:
                raise Unmergeable(f"{bindings[0].module} has no weight of its own")
            weight_NK = self._linears[place]
            self._written.append(place)
            updates = first_rows(place, bindings, arch)
            for _ in merge_linear(weight_NK, updates, lambda: adapter.vector, _PIECE_ELEMENTS):
                pass
            num_bytes += weight_NK.nbytes
        return num_bytes

    def _restore(self) -> int:
        """Copy the store's bytes to every weight that was written; returns their number."""
        self._merged = None
        num_bytes = 0
        while self._written:
            weight_NK = self._linears[self._written[-1]]
            self._base.write(_weight_names(self._model.arch, self._written[-1]), weight_NK)
            self._written.pop()
            num_bytes += weight_NK.nbytes
        return num_bytes


def _weight_names(arch: Architecture, place: Place) -> list[str]:
    layer, name = place
    return [head_name(arch)] if name == HEAD else linear_names(layer, name, "weight")
