"""Devices for engines under test."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

import torch

from rekindle.clock import Clock
from rekindle.engine.gpu_memory import GpuMemory
from rekindle.engine.graphs import Recorder
from rekindle.engine.kernels.interface import (
    AdapterMatrices,
    AttentionBatch,
    AttentionShape,
    Kernels,
    KVPool,
    LoraBatch,
    LoraGroup,
)
from rekindle.engine.kernels.reference import ReferenceKernels
from rekindle.engine.lora_times import ClockMark, LoraTimer
from rekindle.engine.weights import Weights
from rekindle.store.safetensors_file import TensorEntry


class Rerun:
    """A recording that calls the recorded function on the fixed tensors again."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.replay, self.num_replays = self._replay, 0
        self._function = function
        function()

    def _replay(self) -> None:
        self.num_replays += 1
        self._function()


class RerunRecorder:
    def __init__(self) -> None:
        self.recordings: list[Rerun] = []

    def record(self, function: Callable[[], None]) -> Rerun:
        self.recordings.append(Rerun(function))
        return self.recordings[-1]


class TensorDriven(ReferenceKernels):
    """The specification as a GPU reads a batch when it replays: from the tensors, never from lists of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.known: Callable[[], Iterable[AdapterMatrices]] = tuple

    def attention(
        self, qkv_TE: torch.Tensor, pool: KVPool, layer: int, batch: AttentionBatch, shape: AttentionShape
    ) -> torch.Tensor:
        lists = {"query_start": batch.query_start_S1.tolist(), "context": batch.context_S.tolist()}
        return super().attention(qkv_TE, pool, layer, replace(batch, **lists), shape)

    def lora(self, x_TK: torch.Tensor, y_TN: torch.Tensor, batch: LoraBatch, layer: int, group: LoraGroup) -> None:
        found = {it.table_LPF.data_ptr(): it for it in self.known()}
        adapters = tuple(found.get(address) for address in batch.tables_G.tolist())
        read = replace(batch, row_start=batch.row_start_G1.tolist(), adapters=adapters)
        super().lora(x_TK, y_TN, read, layer, group)


class OwnWeights(Weights):
    """Weights that are copies of the file's, as those that are brought to a GPU are."""

    def _is_used_in_place(self, entry: TensorEntry) -> bool:
        return False


class PagedDevice:
    """The CPU with a GPU's memory layout."""

    torch_device = torch.device("cpu")

    def __init__(
        self, make_kernels: Callable[[], Kernels] = ReferenceKernels, recorder: Recorder | None = None
    ) -> None:
        self._make_kernels, self._recorder = make_kernels, recorder

    def kernels(self, shapes: Collection[AttentionShape], *, deterministic: bool) -> Kernels:
        return self._make_kernels()

    def pool_bytes(self, asked: int) -> int:
        return asked

    def recorder(self) -> Recorder | None:
        return self._recorder

    def lora_timer(self, num_layers: int, clock: Clock) -> LoraTimer:
        return LoraTimer(lambda: ClockMark(clock), num_layers, num_layers)

    def memory(self, num_pages: int, page_bytes: int, dtype: torch.dtype) -> GpuMemory:
        return GpuMemory(num_pages, page_bytes, dtype, self.torch_device)
