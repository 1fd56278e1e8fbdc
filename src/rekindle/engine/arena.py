"""Where weights lie that kernels have laid out anew: in memory of the engine's own, or shared with other engines.

The layout follows from the stored weights, the dtype and the kernels alone, so that a second engine, or the next one
after this, maps what the first has made: nothing is computed or copied again. All take the same tensors in the same
order.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Protocol

import torch

from rekindle.clock import Clock
from rekindle.errors import InternalError
from rekindle.protocol.tiers import Publish
from rekindle.store.anonymous_file import seal

_ALIGNMENT = 4096


class Tier(Protocol):
    """The part of the host-memory tier that engines need; see `store.tier_client.TierClient`."""

    def lease(self, name: str) -> tuple[int, int] | None: ...

    def publish(self, made: Publish, descriptor: int) -> bool: ...


class Arena(Protocol):
    """Gives memory for tensors."""

    def take(self, num_elements: int, dtype: torch.dtype, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """A tensor [num_elements] with what `fill` writes into it, perhaps written by another engine already."""
        ...


class OwnArena:
    """Memory of the process's own."""

    def take(self, num_elements: int, dtype: torch.dtype, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        tensor = torch.empty(num_elements, dtype=dtype)
        fill(tensor)
        return tensor


OWN_ARENA = OwnArena()


class ArenaMismatch(InternalError):
    """What the tier keeps under this name was laid out in another way."""


class SharedArena:
    """Memory that the tier keeps under `name`, or will when `publish` is called after the last tensor was taken.

    `most_bytes` bounds what is made here, of elements of `dtype`; untouched memory costs nothing.
    """

    def __init__(self, tier: Tier, name: str, dtype: str, most_bytes: int, clock: Clock) -> None:
        self._tier, self._name, self._dtype, self._clock = tier, name, dtype, clock
        self._used = 0
        self._started_s = clock.monotonic_s()
        found = tier.lease(name)
        self.is_found = found is not None
        if found is not None:
            self._descriptor, self._num_bytes = found
            # Others map it too: nothing here may be written, and a private mapping keeps what would be from them.
            self._map = mmap.mmap(self._descriptor, self._num_bytes, flags=mmap.MAP_PRIVATE)
        else:
            self._num_bytes = most_bytes
            self._descriptor = os.memfd_create("rekindle-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self._descriptor, most_bytes)
            self._map = mmap.mmap(self._descriptor, most_bytes)

    def take(self, num_elements: int, dtype: torch.dtype, fill: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Raises ArenaMismatch if the object found is too small for what is taken."""
        offset = self._used
        self._used += -(-num_elements * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._used > self._num_bytes:
            raise ArenaMismatch(f"{self._name} holds {self._num_bytes} bytes, and {self._used} are taken from it")
        tensor = torch.frombuffer(self._map, dtype=dtype, count=num_elements, offset=offset)
        if not self.is_found:
            fill(tensor)
        return tensor

    def publish(self) -> None:
        """Let others have what was made here. Does nothing with what was found, or if nothing was taken.

        Raises:
            ArenaMismatch: less was taken than was found.
        """
        if self.is_found:
            if self._used != self._num_bytes:
                raise ArenaMismatch(f"{self._name} holds {self._num_bytes} bytes, but {self._used} were taken from it")
        elif self._used:
            os.ftruncate(self._descriptor, self._used)
            seal(self._descriptor)
            made_s = self._clock.monotonic_s() - self._started_s
            self._tier.publish(Publish(self._name, self._used, self._dtype, made_s), self._descriptor)

    def close(self) -> None:
        """Close the descriptor; tensors live on."""
        os.close(self._descriptor)
