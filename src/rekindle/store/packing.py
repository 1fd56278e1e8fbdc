"""Reading, packing and unpacking of what lies in anonymous files: what the host-memory tier does in threads of its own.

Reading what nobody asked for and packing give way to everything else on the machine, in one thread that mostly rests;
somebody waits for what is unpacked, which uses all cores.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from rekindle.clock import Clock
from rekindle.errors import ConfigurationError
from rekindle.pace import Pace
from rekindle.protocol.tiers import Hold, Publish
from rekindle.store.anonymous_file import new_file
from rekindle.store.codecs.choice import Purpose, choose_codec
from rekindle.store.codecs.interface import FRAME_BYTES, FRAME_SIZES, Codec
from rekindle.store.codecs.measure import Measured, measure, sample
from rekindle.store.codecs.packed import open_packed, pack_into, packed_bound
from rekindle.store.codecs.registry import codec_for, codec_named
from rekindle.store.vector_sources import FileSource
from rekindle.units import MIB

CODECS = ("planes-deflate/native", "planes-deflate/isal", "planes-zstd")
"""What is tried, where it is there; others are never better."""

_MOMENT_S = 1e-9
_SMALL_BYTES = 64 * MIB
"""Objects below it have small frames, so that all cores have some, and share the figures of the last one measured."""
_FIGURES_LAST_S = 60.0

P = ParamSpec("P")
T = TypeVar("T")
IsWanted = Callable[[], bool]
"""Whether somebody has leased the object meanwhile, so that the work on it is in vain. Asked in other threads."""


class WantedElsewhere(Exception):
    """Reading or packing was called off because the object was leased."""


@dataclass(frozen=True, slots=True)
class Packed:
    """`descriptor` is that of the packed file of `num_bytes`, None where the object is better left as it is."""

    descriptor: int | None
    num_bytes: int
    reasons: tuple[str, ...]


class Packer:
    """Owns the threads. `read`, `pack` and `unpack` block; one call of the first two may run at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._one = ThreadPoolExecutor(1, "pack", _be_idle)
        self._all = ThreadPoolExecutor(len(os.sched_getaffinity(0)), "unpack")
        self._pace = Pace()
        self._pace.give_way(is_busy=True)
        self._figures: dict[str, tuple[float, list[Measured]]] = {}

    def read(self, made: Hold, is_wanted: IsWanted) -> int:
        """The object from its file, verified, in a new anonymous file.

        Raises:
            WantedElsewhere: somebody has leased it meanwhile.
            AdapterRejected, StoredFileDamaged, OSError: the file is not what it was, or cannot be read.
        """

        def work(target: memoryview) -> None:
            with FileSource(Path(made.path), made.num_bytes, gentle.pause) as file:
                file.read([target])

        gentle = _Gentle(self._one, self._pace, is_wanted)
        with new_file(made.num_bytes) as file:
            self._one.submit(work, memoryview(mmap.mmap(file.descriptor, made.num_bytes))).result()
            return file.finish()

    def pack(self, descriptor: int, made: Publish | Hold, is_wanted: IsWanted) -> Packed:
        """Pack a copy of the object, if that keeps less and has it back sooner than making or reading it again would.

        Raises:
            WantedElsewhere: somebody has leased it meanwhile.
        """
        whole = memoryview(mmap.mmap(descriptor, made.num_bytes, prot=mmap.PROT_READ))
        again_bytes_s = made.num_bytes / max(made.made_s, _MOMENT_S)
        measured = self._measured(whole, made.dtype)
        choice = choose_codec(made.num_bytes, measured, again_bytes_s, Purpose.MEMORY)
        if choice.codec is None:
            return Packed(None, 0, choice.reasons)
        most_bytes = packed_bound(made.num_bytes, frame_bytes := _frame_bytes(made.num_bytes))
        with new_file(most_bytes) as target:
            out = memoryview(mmap.mmap(target.descriptor, most_bytes))
            gentle = _Gentle(self._one, self._pace, is_wanted)
            num_bytes = pack_into(codec_named(choice.codec), whole, made.dtype, out, gentle, frame_bytes)
            exact = [
                replace(it, num_bytes=made.num_bytes, packed_bytes=num_bytes)
                for it in measured
                if it.codec == choice.codec
            ]
            choice = choose_codec(made.num_bytes, exact, again_bytes_s, Purpose.MEMORY)
            if choice.codec is None:
                return Packed(None, 0, choice.reasons)
            os.ftruncate(target.descriptor, num_bytes)
            return Packed(target.finish(), num_bytes, choice.reasons)

    def _measured(self, whole: memoryview, dtype: str) -> Sequence[Measured]:
        """What each codec makes of a sample."""
        now_s = self._clock.monotonic_s()
        measured_s, figures = self._figures.get(dtype, (-_FIGURES_LAST_S, []))
        if len(whole) >= _SMALL_BYTES or now_s - measured_s >= _FIGURES_LAST_S:
            piece = sample(whole)
            figures = [measure(codec, piece, dtype, self._all, repeats=1) for codec in _available()]
            self._figures[dtype] = now_s, figures
        return figures

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


class _Gentle(Executor):
    """Runs what it is given in one thread that rests after every call, until the object is wanted."""

    def __init__(self, thread: Executor, pace: Pace, is_wanted: IsWanted) -> None:
        self._thread, self._pace, self._is_wanted = thread, pace, is_wanted

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def run() -> T:
            self.pause()
            return fn(*args, **kwargs)

        return self._thread.submit(run)

    def pause(self) -> None:
        """Raises WantedElsewhere if the object is."""
        if self._is_wanted():
            raise WantedElsewhere
        self._pace.rest()


def _available() -> Iterator[Codec]:
    for name in CODECS:
        with suppress(ConfigurationError):
            yield codec_named(name)


def _frame_bytes(num_bytes: int) -> int:
    return FRAME_SIZES[0] if num_bytes < _SMALL_BYTES else FRAME_BYTES


def _be_idle() -> None:
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
