"""Packing and unpacking of anonymous files: what the host-memory tier does to objects in threads of its own.

Packing gives way to everything else on the machine and uses one thread; somebody waits for what is unpacked, which uses
all cores.
"""

from __future__ import annotations

import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rekindle.protocol.tiers import Publish
from rekindle.store.anonymous_file import new_file
from rekindle.store.codecs.choice import Purpose, choose_codec
from rekindle.store.codecs.measure import measure, sample
from rekindle.store.codecs.packed import open_packed, pack_into, packed_bound
from rekindle.store.codecs.registry import codec_for, codec_named, probed_codecs

CODECS = ("planes-deflate/native", "planes-deflate/isal", "planes-zstd")
"""What is tried, where it is there; others are never better."""
_MOMENT_S = 1e-9


@dataclass(frozen=True, slots=True)
class Packed:
    """`descriptor` is that of the packed file of `num_bytes`, None where the object is better left as it is."""

    descriptor: int | None
    num_bytes: int
    reasons: tuple[str, ...]


class Packer:
    """Owns the threads. `pack` and `unpack` block."""

    def __init__(self) -> None:
        self._one = ThreadPoolExecutor(1, "pack", _be_idle)
        self._all = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "unpack")

    def pack(self, descriptor: int, made: Publish) -> Packed:
        """Pack a copy of the object, if that keeps less and has it back sooner than making it again would."""
        whole = memoryview(mmap.mmap(descriptor, made.num_bytes, prot=mmap.PROT_READ))
        available = {probed.name for probed in probed_codecs() if probed.codec is not None}
        codecs = [codec_named(name) for name in CODECS if name in available]
        piece = sample(whole)
        measured = [measure(codec, piece, made.dtype, self._all, repeats=1) for codec in codecs]
        choice = choose_codec(made.num_bytes, measured, made.num_bytes / max(made.made_s, _MOMENT_S), Purpose.MEMORY)
        if choice.codec is None:
            return Packed(None, 0, choice.reasons)
        most_bytes = packed_bound(made.num_bytes)
        with new_file(most_bytes) as target:
            out = memoryview(mmap.mmap(target.descriptor, most_bytes))
            num_bytes = pack_into(codec_named(choice.codec), whole, made.dtype, out, self._one)
            os.ftruncate(target.descriptor, num_bytes)
            return Packed(target.finish(), num_bytes, choice.reasons)

    def unpack(self, descriptor: int, num_bytes: int) -> int:
        """The object in a new file.

        Raises:
            PackedDamaged: the packed file is not sound.
        """
        found = open_packed(memoryview(mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ)))
        with new_file(found.num_bytes) as target:
            out = memoryview(mmap.mmap(target.descriptor, found.num_bytes))
            found.unpack(codec_for(found.format), out, self._all)
            return target.finish()

    def close(self) -> None:
        """Let the threads end."""
        self._one.shutdown(cancel_futures=True)
        self._all.shutdown(cancel_futures=True)


def _be_idle() -> None:
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
