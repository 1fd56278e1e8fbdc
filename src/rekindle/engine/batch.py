"""From a step plan to tensors.

Sequences are ordered base first, then adapter by adapter, so that every adapter's rows are one slice; within a sequence
rows rise in position. The rows of an adapter that is merged into the weights come last, so that those of all others are
one slice too. `Layout` keeps the plan's order so that results can be given back in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rekindle.engine.adapters import ResidentAdapter
from rekindle.engine.kernels.interface import AdapterMatrices, AttentionBatch, LoraBatch, make_lora_batch
from rekindle.engine.models.decoder import DecoderWeights, ForwardBatch
from rekindle.engine.scheduler.plan import PlannedSequence
from rekindle.engine.transfer import to_device
from rekindle.protocol.identity import AdapterDigest, RequestId


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows `start .. end` of a step belong to one adapter."""

    adapter: ResidentAdapter
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Merged:
    """An adapter that is merged into a step's weights: into `weights`, or the model's own if that is None. `negated`
    are its matrices with scales of opposite sign, which rows of others get."""

    digest: AdapterDigest
    weights: DecoderWeights | None
    negated: AdapterMatrices
    changes_head: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """A step's rows. `order[i]` is the plan's index of the i-th sequence in row order, which owns rows
    `starts[i] .. starts[i + 1]`."""

    order: tuple[int, ...]
    starts: tuple[int, ...]
    adapters: tuple[AdapterRows, ...]
    forward: ForwardBatch
    merged: Merged | None


def lay_out(
    sequences: Sequence[PlannedSequence],
    page_tokens: int,
    adapter_of: Callable[[AdapterDigest], ResidentAdapter],
    latest_samples: Mapping[RequestId, Sequence[int]],
    device: torch.device,
    pool_PX: torch.Tensor | None,
    merged: Merged | None = None,
) -> Layout:
    """Build a step's tensors. `latest_samples` fills the positions planned before their tokens were known. `pool_PX`
    is the pool that adapters are read from where they are not mapped."""

    def place(i: int) -> tuple[bool, str]:
        digest = sequences[i].request.adapter
        return merged is not None and digest == merged.digest, digest or ""

    order = sorted(range(len(sequences)), key=place)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for i in order:
        planned = sequences[i]
        token_ids += planned.token_ids
        if planned.num_placeholders:
            token_ids += latest_samples[planned.request.request_id][-planned.num_placeholders :]
        end = planned.start + planned.num_positions
        positions += range(planned.start, end)
        pages = planned.pages
        slots += [pages[p // page_tokens] * page_tokens + p % page_tokens for p in range(planned.start, end)]
        starts.append(len(positions))
    ordered = [sequences[i] for i in order]
    adapters = _adapter_rows(ordered, starts, adapter_of)
    forward = ForwardBatch(
        token_ids_T=to_device(token_ids, torch.int64, device),
        positions_T=to_device(positions, torch.int64, device),
        attention=_attention_batch(ordered, starts, slots, page_tokens, device),
        lora=lora_batch([rows for rows in adapters if not is_merged(rows, merged)], len(positions), pool_PX),
        unmerge=unmerge_batch(adapters, len(positions), merged, pool_PX),
        weights=None if merged is None else merged.weights,
    )
    return Layout(tuple(order), tuple(starts), adapters, forward, merged)


def is_merged(rows: AdapterRows, merged: Merged | None) -> bool:
    """Whether these rows find their adapter in the weights."""
    return merged is not None and rows.adapter.manifest.digest == merged.digest


def unmerge_batch(
    adapters: Sequence[AdapterRows], num_rows: int, merged: Merged | None, pool_PX: torch.Tensor | None = None
) -> LoraBatch | None:
    """What takes the merged adapter off the rows of all others, which come before its own; None if there are none."""
    if merged is None:
        return None
    first = next((rows.start for rows in adapters if is_merged(rows, merged)), num_rows)
    if first == 0:
        return None
    if first == num_rows:
        return make_lora_batch([0, num_rows], [merged.negated], pool_PX)
    return make_lora_batch([0, first, num_rows], [merged.negated, None], pool_PX)


def lora_batch(adapters: Sequence[AdapterRows], num_rows: int, pool_PX: torch.Tensor | None = None) -> LoraBatch | None:
    """The adapters of `num_rows` rows as kernels see them; None if all rows use the base alone.

    Rows between or after the given groups become segments that change nothing.
    """
    if not adapters:
        return None
    row_start: list[int] = []
    matrices: list[AdapterMatrices | None] = []
    end = adapters[0].start
    for rows in adapters:
        if rows.start > end:
            row_start.append(end)
            matrices.append(None)
        row_start.append(rows.start)
        matrices.append(rows.adapter.matrices)
        end = rows.end
    if end < num_rows:
        row_start.append(end)
        matrices.append(None)
    return make_lora_batch([*row_start, num_rows], matrices, pool_PX)


def select_rows(adapters: Sequence[AdapterRows], rows: Sequence[int]) -> tuple[AdapterRows, ...]:
    """Which of the chosen rows, which rise, belong to which adapter, counted in their own order."""
    selected = []
    for group in adapters:
        mine = [i for i, row in enumerate(rows) if group.start <= row < group.end]
        if mine:
            selected.append(AdapterRows(group.adapter, mine[0], mine[-1] + 1))
    return tuple(selected)


def _adapter_rows(
    ordered: Sequence[PlannedSequence],
    starts: Sequence[int],
    adapter_of: Callable[[AdapterDigest], ResidentAdapter],
) -> tuple[AdapterRows, ...]:
    groups: list[AdapterRows] = []
    first = 0
    for i, planned in enumerate(ordered):
        digest = planned.request.adapter
        is_last = i + 1 == len(ordered) or ordered[i + 1].request.adapter != digest
        if is_last:
            if digest is not None:
                groups.append(AdapterRows(adapter_of(digest), starts[first], starts[i + 1]))
            first = i + 1
    return tuple(groups)


def _attention_batch(
    ordered: Sequence[PlannedSequence], starts: list[int], slots: list[int], page_tokens: int, device: torch.device
) -> AttentionBatch:
    context = [planned.start + planned.num_positions for planned in ordered]
    width = max(-(-length // page_tokens) for length in context)
    pages = [list(planned.pages[:width]) for planned in ordered]
    padded = [row + [0] * (width - len(row)) for row in pages]
    return AttentionBatch(
        query_start=starts,
        context=context,
        query_start_S1=to_device(starts, torch.int32, device),
        context_S=to_device(context, torch.int32, device),
        pages_SM=to_device(padded, torch.int32, device),
        slots_T=to_device(slots, torch.int64, device),
    )
