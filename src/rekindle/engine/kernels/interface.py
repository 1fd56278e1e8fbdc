"""The operations of a forward pass, and the batch records they read.

Shape suffixes: T token rows of the step, S sequences, G adapter segments, L layers, H hidden size, N and K a
matrix's output and input features, E = (query heads + 2 x kv heads) x D, D head size, P pages, B page tokens,
M page-table width, V vocabulary.

Rows are ordered so that the rows of one adapter are adjacent and base rows come first; the rows of one sequence
are adjacent and rise in position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rekindle.engine.arena import OWN_ARENA, Arena
from rekindle.engine.transfer import to_device
from rekindle.errors import InternalError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Column order of `AdapterMatrices.table_LPF`."""

LORA_FIELDS = 4
"""Fields of one table entry: where A and where the transpose of B begin in the adapter's vector, in elements; the rank;
the bits of the float64 scale. Rank 0: no update."""

RANK_FIELD, SCALE_FIELD = 2, 3


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One layer's attention. `window` counts the positions a query sees, itself included; 0 sees all.
    `softcap` > 0 bounds scores to softcap * tanh(score / softcap) before the mask."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where each sequence's queries, keys and values are.

    Sequence s owns query rows `query_start[s] .. query_start[s + 1]`, the last positions of a context of
    `context[s]` tokens, whose keys and values lie in pages `pages_SM[s]` in order. `slots_T` is page * B + offset,
    the place each row's own key and value go. The lists and the int32/int64 tensors hold the same numbers.
    """

    query_start: list[int]
    context: list[int]
    query_start_S1: torch.Tensor  # int32 [S + 1]
    context_S: torch.Tensor  # int32 [S]
    pages_SM: torch.Tensor  # int32 [S, M], padded with any valid page
    slots_T: torch.Tensor  # int64 [T]


@dataclass(frozen=True, slots=True)
class KVPool:
    """The page pool seen as keys and values: kv_PLBCD is [P, L, B, 2 * kv heads, D], strided over pages, so that
    one page holds all layers of its tokens, and one token's keys then values of a layer are contiguous."""

    kv_PLBCD: torch.Tensor


@dataclass(frozen=True, slots=True)
class AdapterMatrices:
    """Where one adapter's matrices lie.

    Entry [layer, projection] of `table_LPF` (int64, see `LORA_FIELDS`) locates A [rank, K] and B transposed [rank, N],
    both row-major in the compute dtype, in the adapter's flat vector. Layer index L (one past the last) holds lm_head
    at projection 0. On a CPU the vector is mapped as a whole and `vector` views it. On a GPU it lies in the pages
    `pages_M` (int32) of the pool, in order; matrices begin at multiples of 64 elements, and so do pages. `max_rank` is
    the largest rank in the table.
    """

    table_LPF: torch.Tensor
    max_rank: int
    vector: torch.Tensor | None = None
    pages_M: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LoraBatch:
    """The adapters of a step.

    Segment g covers rows `row_start[g] .. row_start[g + 1]`, which `adapters[g]` changes, None being the base; rows
    before `row_start[0]` use the base alone. `tables_G` and `places_G` hold the addresses of each adapter's `table_LPF`
    and of its `vector` or `pages_M`, 0 for the base. `max_rank` bounds the ranks. `pool_PX` is the pool as pages of
    elements, on a GPU. The memory is owned by the adapter pool and pinned while the step runs.

    A batch whose `adapters` are empty describes capacities alone: kernels of a GPU that are recorded with it read
    everything else from the tensors when they are replayed, `row_start` bounding numbers of rows and segments.
    """

    row_start: list[int]
    row_start_G1: torch.Tensor  # int32 [G + 1]
    adapters: tuple[AdapterMatrices | None, ...]
    tables_G: torch.Tensor  # int64 [G]
    places_G: torch.Tensor  # int64 [G]
    max_rank: int
    pool_PX: torch.Tensor | None = None


def make_lora_batch(
    row_start: list[int], adapters: Sequence[AdapterMatrices | None], pool_PX: torch.Tensor | None = None
) -> LoraBatch:
    """A `LoraBatch` of these segments, on the device of the pool, or of the CPU without one."""
    device = torch.device("cpu") if pool_PX is None else pool_PX.device
    return LoraBatch(
        row_start,
        to_device(row_start, torch.int32, device),
        tuple(adapters),
        to_device([0 if it is None else it.table_LPF.data_ptr() for it in adapters], torch.int64, device),
        to_device([0 if it is None else _place(it).data_ptr() for it in adapters], torch.int64, device),
        max((it.max_rank for it in adapters if it is not None), default=0),
        pool_PX,
    )


def _place(adapter: AdapterMatrices) -> torch.Tensor:
    place = adapter.pages_M if adapter.vector is None else adapter.vector
    if place is None:
        raise InternalError("an adapter's matrices are neither mapped nor in pages")
    return place


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Projections that share one input: columns `first .. first + count` of the tables, writing to
    `out_offsets[i] .. out_offsets[i] + out_sizes[i]` of the fused output's columns."""

    first: int
    out_offsets: tuple[int, ...]
    out_sizes: tuple[int, ...]


class Rows(Protocol):
    """A stored tensor [N, ...] that is yet to be brought to the device, in the compute dtype."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def whole(self) -> torch.Tensor:
        """All of it, to keep."""
        ...

    def blocks(self, multiple: int) -> Iterator[torch.Tensor]:
        """From the first row to the last in blocks, each of which may be read until the next is asked for. All but the
        last have a multiple of `multiple` rows."""
        ...


@dataclass(frozen=True, slots=True)
class TensorRows:
    """`Rows` of a tensor that is there."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def whole(self) -> torch.Tensor:
        return self.tensor

    def blocks(self, multiple: int) -> Iterator[torch.Tensor]:
        yield self.tensor


class PackedLinear(Protocol):
    """A linear layer's weight in whatever layout its kernels want; callable on x_TK, giving y_TN."""

    in_features: int
    out_features: int

    def __call__(self, x_TK: torch.Tensor) -> torch.Tensor: ...


class Kernels(Protocol):
    """What a model definition may call. Arithmetic runs in float32 and is rounded once to the compute dtype."""

    @property
    def layout(self) -> str | None:
        """Names the form that weights are given in an arena; None if they do not go there."""
        ...

    def pack_linear(self, weight_NK: Rows, bias_N: Rows | None, arena: Arena = OWN_ARENA) -> PackedLinear:
        """Prepare a weight for repeated use. The packed form lies in the arena, or owns its memory, or shares the
        weight's. The bias is taken after the weight."""
        ...

    def multiply(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """x W^T for a weight as it is stored, such as one that lies in an adapter's pages."""
        ...

    def rms_norm(
        self, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """x / rms(x) * weight over the last dimension, in `dtype` (that of x if None). weight_H is float32. Works on
        any leading shape."""
        ...

    def add_rms_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual += x, in place; return rms_norm(residual) in the dtype of x. residual_TH is float32."""
        ...

    def rope_and_store(
        self,
        qkv_TE: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        pool: KVPool,
        layer: int,
        batch: AttentionBatch,
        shape: AttentionShape,
    ) -> None:
        """Rotate queries and keys of qkv_TE in place and write keys and values into their pages.

        qkv_TE holds queries, keys, values side by side, head by head. cos_TD and sin_TD are float32 [T, D / 2]; element
        i of a head is rotated with element i + D / 2 (the Hugging Face convention).
        """
        ...

    def attention(
        self, qkv_TE: torch.Tensor, pool: KVPool, layer: int, batch: AttentionBatch, shape: AttentionShape
    ) -> torch.Tensor:
        """Causal attention of every query row over its sequence's pages; returns [T, heads * D]."""
        ...

    def gated_activation(self, gate_up_TF: torch.Tensor, activation: str) -> torch.Tensor:
        """act(gate) * up, where gate and up are the two halves of the columns; "silu" or "gelu_tanh"."""
        ...

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        """y[rows, slice] += scale * (x[rows] @ A.T) @ B.T for each segment and each projection of the group, in place.

        The intermediate x @ A.T stays in float32; the sum is rounded once to y's dtype.
        """
        ...
