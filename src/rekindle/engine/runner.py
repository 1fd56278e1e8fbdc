"""Carries out step plans on the device: lays out the batch, runs the model, samples.

A step that fails is run again sequence by sequence, so that only the sequences at fault end with an error.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from rekindle.engine.adapters import AdapterMemory
from rekindle.engine.batch import (
    Layout,
    Merged,
    is_merged,
    lay_out,
    lora_batch,
    select_rows,
    unmerge_batch,
)
from rekindle.engine.graphs import DecodeGraphs
from rekindle.engine.kernels.interface import KVPool
from rekindle.engine.lora_times import Spans, elapsed_s
from rekindle.engine.merging import Merging
from rekindle.engine.models.decoder import Decoder
from rekindle.engine.sampling import Sampled, SampleRow, logprobs_of, sample
from rekindle.engine.scheduler.plan import PlannedSequence, SequenceResult, StepPlan, StepResult
from rekindle.protocol.generation import TokenLogprobs
from rekindle.protocol.identity import RequestId

_logger = logging.getLogger(__name__)

_PROMPT_LOGPROB_ROWS = 64
"""Prompt rows whose logits are held at once."""
_MAX_UNREAD = 4
"""Steps whose times may be outstanding: those that sample nothing are run ahead of a GPU."""


class Runner:
    """One model on one device. Owns no budget and makes no choice that the plan has not made."""

    def __init__(
        self,
        model: Decoder,
        pool: KVPool,
        adapters: AdapterMemory,
        pool_PX: torch.Tensor | None = None,
        graphs: DecodeGraphs | None = None,
        merging: Merging | None = None,
    ) -> None:
        self._model, self._pool, self._adapters, self._pool_PX = model, pool, adapters, pool_PX
        self._graphs, self._merging = graphs, merging
        self._device = pool.kv_PLBCD.device
        self._page_tokens = pool.kv_PLBCD.shape[2]
        self._latest_samples: dict[RequestId, tuple[int, ...]] = {}
        self._timed: deque[tuple[StepPlan, Spans]] = deque(maxlen=_MAX_UNREAD)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute every planned sequence. Never raises for what one sequence did, hence the broad handlers; see
        `SequenceResult.error`."""
        merged = None if self._merging is None else self._merging.prepare(plan.merged)
        try:
            results = self._run(plan.sequences, merged)
            is_as_planned = plan.merged == (merged and merged.digest)
        except Exception:
            _logger.exception("step %d failed; running its sequences one by one", plan.step)
            if self._merging is not None:
                self._merging.prepare(None)
            results, is_as_planned = [self._run_alone(planned) for planned in plan.sequences], False
        if self._model.timer is not None:
            spans = self._model.timer.take()
            if is_as_planned:
                self._timed.append((plan, spans))
        self._latest_samples = {
            planned.request.request_id: result.token_ids
            for planned, result in zip(plan.sequences, results, strict=True)
            if result.token_ids
        }
        return StepResult(plan.step, tuple(results))

    def lora_times(self) -> Iterator[tuple[StepPlan, float]]:
        """Steps that ran as planned with the seconds that their low-rank updates took, once each when that is known."""
        while self._timed and (lora_s := elapsed_s(self._timed[0][1])) is not None:
            yield self._timed.popleft()[0], lora_s

    @torch.inference_mode()
    def between_steps(self) -> None:
        """What makes later steps faster, a little at a time."""
        if self._graphs is not None:
            self._graphs.record_next()

    def _run_alone(self, planned: PlannedSequence) -> SequenceResult:
        try:
            return self._run([planned], None)[0]
        except Exception as error:
            _logger.exception("request %s failed alone", planned.request.request_id)
            return SequenceResult(error=f"the engine could not compute this request: {error}")

    def _run(self, sequences: Sequence[PlannedSequence], merged: Merged | None) -> list[SequenceResult]:
        layout = lay_out(
            sequences, self._page_tokens, self._adapters.get, self._latest_samples, self._device, self._pool_PX, merged
        )
        hidden_TH = self._forward(layout)
        sampled = self._sample(sequences, layout, hidden_TH)
        results: list[SequenceResult | None] = [None] * len(sequences)
        for place, index in enumerate(layout.order):
            prompt_logprobs = self._prompt_logprobs(sequences[index], layout, place, hidden_TH)
            results[index] = _result(sequences[index], sampled.get(index), prompt_logprobs)
        return [result for result in results if result is not None]

    def _forward(self, layout: Layout) -> torch.Tensor:
        embedded_TH = self._embed(layout)
        is_decode = len(layout.order) == len(embedded_TH)
        if self._graphs is not None and is_decode:
            hidden_TH = self._graphs.run(embedded_TH, layout.forward)
            if hidden_TH is not None:
                return hidden_TH
        return self._model.forward(embedded_TH, layout.forward, self._pool)

    def _embed(self, layout: Layout) -> torch.Tensor:
        token_ids_T = layout.forward.token_ids_T
        embedded_TH = self._model.embed(token_ids_T)
        for rows in layout.adapters:
            part = slice(rows.start, rows.end)
            vector = rows.adapter.vector
            if (matrix := rows.adapter.replaced_embedding) is not None:
                embedded_TH[part] = vector.rows(matrix.offset, matrix.columns, token_ids_T[part])
            if (update := rows.adapter.embedding) is not None:
                a_TR = vector.rows(update.a_offset, update.rank, token_ids_T[part])
                b_HR = torch.cat(list(vector.parts(update.b_offset, update.out_features, update.rank)))
                delta_TH = self._model.low_rank(a_TR, b_HR, update.scale)
                embedded_TH[part] = (embedded_TH[part].float() + delta_TH).to(embedded_TH.dtype)
        return embedded_TH

    def _logits(self, hidden_TH: torch.Tensor, rows: list[int], layout: Layout) -> torch.Tensor:
        """Logits of the chosen rows, under the adapters that change the output head."""
        chosen = select_rows([group for group in layout.adapters if group.adapter.changes_head], rows)
        hidden_RH = hidden_TH if len(rows) == len(hidden_TH) else hidden_TH[rows]
        merged, pool_PX = layout.merged, self._pool_PX
        is_head_merged = merged is not None and merged.changes_head
        unmerge = unmerge_batch(chosen, len(rows), merged, pool_PX) if is_head_merged else None
        own = lora_batch([group for group in chosen if not is_merged(group, merged)], len(rows), pool_PX)
        logits_RV = self._model.logits(hidden_RH, (unmerge, own), layout.forward.weights)
        for group in chosen:
            if (head := group.adapter.replaced_head) is not None:
                part = slice(group.start, group.end)
                parts = group.adapter.vector.parts(head.offset, head.rows, head.columns)
                logits_RV[part] = self._model.logits_with_head(hidden_RH[part], parts)
        return logits_RV

    def _sample(
        self, sequences: Sequence[PlannedSequence], layout: Layout, hidden_TH: torch.Tensor
    ) -> dict[int, Sampled]:
        places = [place for place, index in enumerate(layout.order) if sequences[index].samples]
        if not places:
            return {}
        indices = [layout.order[place] for place in places]
        logits_RV = self._logits(hidden_TH, [layout.starts[place + 1] - 1 for place in places], layout)
        rows = [self._sample_row(sequences[index]) for index in indices]
        return dict(zip(indices, sample(logits_RV, rows), strict=True))

    def _sample_row(self, planned: PlannedSequence) -> SampleRow:
        request = planned.request
        pending = self._latest_samples.get(request.request_id, ()) if planned.num_placeholders else ()
        generated = (*planned.history, *pending) if pending else planned.history
        return SampleRow(request.sampling, request.prompt_token_ids, generated)

    def _prompt_logprobs(
        self, planned: PlannedSequence, layout: Layout, place: int, hidden_TH: torch.Tensor
    ) -> tuple[TokenLogprobs, ...]:
        num_top = planned.request.sampling.prompt_logprobs
        if not planned.wants_prompt_logprobs or num_top is None:
            return ()
        prompt = planned.request.prompt_token_ids
        targets = prompt[planned.start + 1 : planned.start + planned.num_positions + 1]
        first_row = layout.starts[place]
        found: list[TokenLogprobs] = []
        for i in range(0, len(targets), _PROMPT_LOGPROB_ROWS):
            part = targets[i : i + _PROMPT_LOGPROB_ROWS]
            rows = list(range(first_row + i, first_row + i + len(part)))
            found += logprobs_of(self._logits(hidden_TH, rows, layout), part, num_top)
        return tuple(found)


def _result(
    planned: PlannedSequence, sampled: Sampled | None, prompt_logprobs: tuple[TokenLogprobs, ...]
) -> SequenceResult:
    if sampled is not None and sampled.error is not None:
        return SequenceResult(error=sampled.error)
    return SequenceResult(
        token_ids=(sampled.token_id,) if sampled else (),
        num_accepted=planned.num_positions,
        logprobs=(sampled.logprobs,) if sampled and sampled.logprobs else None,
        prompt_logprobs=prompt_logprobs,
    )
