"""Devices for engines under test."""

from collections.abc import Callable, Collection

import torch

from rekindle.engine.gpu_memory import GpuMemory
from rekindle.engine.graphs import Recorder
from rekindle.engine.kernels.interface import AttentionShape, Kernels
from rekindle.engine.kernels.reference import ReferenceKernels


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

    def memory(self, num_pages: int, page_bytes: int, dtype: torch.dtype) -> GpuMemory:
        return GpuMemory(num_pages, page_bytes, dtype, self.torch_device)
