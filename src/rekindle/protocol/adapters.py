"""An adapter version as the engine sees it: where each matrix lies in one flat vector, and what it binds to.

The stored file is plain safetensors whose data section *is* the flat vector, in the adapter's own dtype: matrices
in the order of first use, each starting at a multiple of `ALIGNMENT_ELEMENTS`, so that loading is one sequential
read. Offsets and sizes count elements, not bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.protocol.identity import AdapterDigest, ModelDigest

ALIGNMENT_ELEMENTS = 64
ADAPTER_FILE_NAME = "adapter.safetensors"
ADAPTER_LAYOUT = 2
"""How `LoraBinding` lays matrices out. Layout 1, of before the first release, stored B untransposed."""


@dataclass(frozen=True, slots=True)
class LoraBinding:
    """One low-rank update: y += scale * (x @ A.T) @ B.T.

    `projection` is the last part of the module's name ("q_proj", "down_proj", "lm_head", "embed_tokens"); `layer` is
    -1 outside the layers. At `a_offset` lies A, [rank, in_features] row-major, and at `b_offset` the transpose of B,
    [rank, out_features] row-major. For "embed_tokens" these are the transpose of PEFT's A, [num_embeddings, rank], so
    that a token's row is contiguous, and B itself, [dimension, rank].
    """

    module: str
    projection: str
    layer: int
    rank: int
    scale: float
    in_features: int
    out_features: int
    a_offset: int
    b_offset: int


@dataclass(frozen=True, slots=True)
class ReplacedMatrix:
    """A whole matrix saved with the adapter that stands in for the base's: "lm_head" or "embed_tokens",
    [rows, columns] row-major at `offset`, of the same shape as the base's."""

    module: str
    projection: str
    rows: int
    columns: int
    offset: int


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """One immutable adapter version, bound to one base model.

    `dtype` is the safetensors name of the file's element type; `num_elements` is the flat vector's length with its
    alignment padding. `ranks` are the distinct ranks, rising; `targets` the distinct projections, sorted. A `layout`
    other than `ADAPTER_LAYOUT` cannot be read.
    """

    digest: AdapterDigest
    base: ModelDigest
    dtype: str
    num_elements: int
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    bindings: tuple[LoraBinding, ...]
    replaced: tuple[ReplacedMatrix, ...] = ()
    layout: int = 1
