"""How well and how fast a codec packs given bytes, measured on a sample of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from rekindle.errors import InternalError
from rekindle.store.codecs.interface import FRAME_BYTES, Codec
from rekindle.store.codecs.packed import open_packed, pack_into, packed_bound
from rekindle.store.safetensors_file import Bytes
from rekindle.units import MIB


@dataclass(frozen=True, slots=True)
class Measured:
    """One codec on one sample. Rates are unpacked bytes a second, with as many threads as it was measured with."""

    codec: str
    num_bytes: int
    packed_bytes: int
    pack_bytes_s: float
    unpack_bytes_s: float

    @property
    def share(self) -> float:
        """Packed bytes of unpacked bytes."""
        return self.packed_bytes / self.num_bytes


def sample(data: Bytes, max_bytes: int = 16 * MIB) -> bytearray:
    """Whole frames from all over `data`, evenly, of `max_bytes` in all; everything where `data` is no longer."""
    whole = memoryview(data).cast("B")
    if len(whole) <= max_bytes:
        return bytearray(whole)
    num_frames, num_taken = len(whole) // FRAME_BYTES, max(1, max_bytes // FRAME_BYTES)
    starts = (FRAME_BYTES * (index * num_frames // num_taken) for index in range(num_taken))
    return bytearray(b"".join(whole[start : start + FRAME_BYTES] for start in starts))


def measure(codec: Codec, data: Bytes, dtype: str, executor: Executor | None = None, repeats: int = 3) -> Measured:
    """Pack and unpack `data`, which is not empty, and keep the best times of `repeats`.

    Buffers are written once before, so that the first touch of their pages is not timed.

    Raises:
        InternalError: what was unpacked is not what was packed.
    """
    whole = memoryview(data).cast("B")
    buffer = bytearray(packed_bound(len(whole)))
    out = bytearray(len(whole))
    length = 0

    def pack() -> None:
        nonlocal length
        length = pack_into(codec, whole, dtype, buffer, executor)

    pack_s = _best_s(pack, repeats)
    packed = open_packed(memoryview(buffer)[:length])
    unpack_s = _best_s(lambda: packed.unpack(codec, out, executor), repeats)
    if whole != out:
        raise InternalError(f"{codec.name} changed bytes of {dtype}; do not use it and report this")
    return Measured(codec.name, len(whole), length, len(whole) / pack_s, len(whole) / unpack_s)


def _best_s(function: Callable[[], None], repeats: int) -> float:
    durations_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        function()
        durations_s.append(time.perf_counter() - started_s)
    return min(durations_s)
