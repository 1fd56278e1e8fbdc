"""What a replica runs on: its kernels and its memory."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch

from rekindle.clock import Clock
from rekindle.engine.adapters import VectorLoader
from rekindle.engine.gpu_memory import GpuMemory
from rekindle.engine.graphs import CudaRecorder, Recorder
from rekindle.engine.host_memory import HostMemory
from rekindle.engine.kernels.interface import AttentionShape, Kernels, KVPool
from rekindle.engine.kernels.select import select_cpu_kernels, select_gpu_kernels
from rekindle.engine.lora_times import ClockMark, LoraTimer
from rekindle.errors import ConfigurationError
from rekindle.protocol.replica import EngineSettings

_SHARE_OF_FREE_MEMORY = 0.9
"""How much of a GPU's free memory becomes the pool where no size is given; the rest is room for activations."""
_TIMED_LAYERS = 4
"""Layers of a GPU's steps in which updates are timed: 32 events a step, which take well under 1% of it."""


class DeviceMemory(VectorLoader, Protocol):
    """The page pool's memory. `pool_PX` is the pool as pages of elements where adapters are read from their pages, with
    one page more than asked for at its end that belongs to nobody; None where they are mapped."""

    @property
    def pool_PX(self) -> torch.Tensor | None: ...  # noqa: N802

    def kv(self, shape: AttentionShape, num_layers: int, page_tokens: int) -> KVPool:
        """The pool as keys and values; a page may be a little longer than its tokens need."""
        ...

    def close(self) -> None:
        """Give the memory up."""
        ...


class Device(Protocol):
    """One CPU or one GPU."""

    @property
    def torch_device(self) -> torch.device: ...

    def kernels(self, shapes: Collection[AttentionShape], *, deterministic: bool) -> Kernels:
        """The best kernels there are here for attention of these shapes."""
        ...

    def pool_bytes(self, asked: int) -> int:
        """The size of the pool: what was asked for, or what the device can give if that is 0."""
        ...

    def recorder(self) -> Recorder | None:
        """What records computations here, if launching them one by one costs time."""
        ...

    def lora_timer(self, num_layers: int, clock: Clock) -> LoraTimer:
        """What tells how long updates take here."""
        ...

    def memory(self, num_pages: int, page_bytes: int, dtype: torch.dtype) -> DeviceMemory:
        """Reserve a pool.

        Raises:
            ConfigurationError: there is not enough memory.
        """
        ...


class CpuDevice:
    """The host's processor."""

    torch_device = torch.device("cpu")

    def kernels(self, shapes: Collection[AttentionShape], *, deterministic: bool) -> Kernels:
        return select_cpu_kernels(shapes, deterministic=deterministic)

    def pool_bytes(self, asked: int) -> int:
        return asked

    def recorder(self) -> None:
        return None

    def lora_timer(self, num_layers: int, clock: Clock) -> LoraTimer:
        return LoraTimer(lambda: ClockMark(clock), num_layers, max_layers=num_layers)

    def memory(self, num_pages: int, page_bytes: int, dtype: torch.dtype) -> DeviceMemory:
        return HostMemory(num_pages, page_bytes, dtype)


class CudaDevice:
    """A CUDA GPU.

    Raises:
        ConfigurationError: torch finds no such GPU.
    """

    def __init__(self, name: str) -> None:
        index, num_devices = torch.device(name).index or 0, torch.cuda.device_count()
        if index >= num_devices:
            raise ConfigurationError(
                f"engine.device {name!r} cannot be used: PyTorch {torch.__version__} finds {num_devices} CUDA GPUs; "
                "choose cpu, or install a CUDA build of PyTorch"
            )
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)

    def kernels(self, shapes: Collection[AttentionShape], *, deterministic: bool) -> Kernels:
        return select_gpu_kernels(deterministic=deterministic)

    def pool_bytes(self, asked: int) -> int:
        if asked:
            return asked
        free_bytes, _ = torch.cuda.mem_get_info(self.torch_device)
        return int(free_bytes * _SHARE_OF_FREE_MEMORY)

    def recorder(self) -> Recorder:
        return CudaRecorder()

    def lora_timer(self, num_layers: int, clock: Clock) -> LoraTimer:
        # External events are part of a recording and get new times with each replay; outside they are as others.
        return LoraTimer(
            lambda: torch.cuda.Event(enable_timing=True, external=True),  # type: ignore[no-untyped-call]
            num_layers,
            _TIMED_LAYERS,
        )

    def memory(self, num_pages: int, page_bytes: int, dtype: torch.dtype) -> DeviceMemory:
        return GpuMemory(num_pages, page_bytes, dtype, self.torch_device)


def device_of(settings: EngineSettings) -> Device:
    """The device that the settings name.

    Raises:
        ConfigurationError: there is no such device here.
    """
    return CpuDevice() if settings.device == "cpu" else CudaDevice(settings.device)
