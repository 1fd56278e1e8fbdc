"""How long loaders take to bring weights from a file into host memory, next to what the disk itself gives.

All loaders load the same tensors, round after round, each time in another order: cold (the file's pages were dropped
from the page cache) and warm (they are all in it). A load ends when one byte of every page of every tensor has been
read, which maps what was only promised until then. In a round before those that count every loader's tensors are
compared bit for bit.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rekindle.bench.hardware import Hardware
from rekindle.bench.loaders import OURS, Loader, loaders_of, same, touch
from rekindle.bench.report import Table
from rekindle.bench.weight_files import WeightFiles, weight_files
from rekindle.errors import InternalError
from rekindle.protocol.storage import StorageProfile
from rekindle.store.reading import aligned_buffer, read_file, resident_share
from rekindle.units import format_bytes

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LoadTimes:
    """One loader, one size. Times in seconds, one a round, in order."""

    loader: str
    is_mapped: bool
    cold_s: tuple[float, ...]
    warm_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SizeTimes:
    """One size. `probe_s` are direct reads of the whole file into used memory, one before the cold loads of each round:
    the disk's own rate."""

    num_bytes: int
    num_tensors: int
    probe_s: tuple[float, ...]
    loaders: tuple[LoadTimes, ...]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Everything one run found."""

    version: str
    hardware: Hardware
    directory: str
    profile: StorageProfile
    versions: dict[str, str]
    sizes: tuple[SizeTimes, ...]


def measure_size(
    directory: Path, num_bytes: int, num_rounds: int, profile: StorageProfile, say: Say = lambda _: None
) -> SizeTimes:
    """Make files of that size in `directory`, measure, and remove them.

    Raises:
        ConfigurationError: the disk has no room for the files.
        InternalError: a loader gave other tensors than the rest.
    """
    say(f"writing {format_bytes(num_bytes)}")
    with weight_files(directory, num_bytes) as files:
        loaders = loaders_of(files, profile)
        _compare(loaders)
        probe_s: list[float] = []
        cold_s: dict[str, list[float]] = {loader.name: [] for loader in loaders}
        warm_s: dict[str, list[float]] = {loader.name: [] for loader in loaders}
        for index in range(num_rounds):
            say(f"{format_bytes(num_bytes)}: round {index + 1} of {num_rounds}")
            probe_s.append(_probe(files, profile))
            for loader in _shuffled(loaders, 2 * index):
                drop_from_cache(loader.path)
                cold_s[loader.name].append(_timed(loader))
            for loader in _shuffled(loaders, 2 * index + 1):
                fill_cache(loader.path)
                warm_s[loader.name].append(_timed(loader))
        times = [
            LoadTimes(loader.name, loader.is_mapped, tuple(cold_s[loader.name]), tuple(warm_s[loader.name]))
            for loader in loaders
        ]
        return SizeTimes(files.num_bytes, files.num_tensors, tuple(probe_s), tuple(times))


def load_table(size: SizeTimes) -> Table:
    """Medians; how many times ours others take; and the share of the disk's own rate."""
    ours = next(times for times in size.loaders if times.loader == OURS)
    rows = [
        (
            f"{times.loader} *" if times.is_mapped else times.loader,
            _ms(times.cold_s), _gigabytes_s(size, times.cold_s), _ratio(times.cold_s, ours.cold_s),
            f"{median(size.probe_s) / median(times.cold_s):.2f}",
            _ms(times.warm_s), _gigabytes_s(size, times.warm_s), _ratio(times.warm_s, ours.warm_s),
        )
        for times in size.loaders
    ]  # fmt: skip
    title = (
        f"{format_bytes(size.num_bytes)} in {size.num_tensors} tensors; the disk gives "
        f"{_gigabytes_s(size, size.probe_s)} GB/s; medians of {len(size.probe_s)}; "
        "* mapped, read by the touch of every page"
    )
    header = ("LOADER", "COLD ms", "GB/s", "OF OURS", "OF DISK", "WARM ms", "GB/s", "OF OURS")
    return Table(title, header, tuple(rows))


def drop_from_cache(path: Path) -> None:
    """Take a file's pages out of the page cache, as far as no one has them mapped."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _timed(loader: Loader) -> float:
    gc.collect()
    started_s = time.perf_counter()
    loaded = loader.load()
    touch(loaded.tensors)
    duration_s = time.perf_counter() - started_s
    loaded.close()
    return duration_s


def _compare(loaders: Sequence[Loader]) -> None:
    """Also the round in which libraries do what they do only once."""
    expected = loaders[0].load()
    for loader in loaders[1:]:
        loaded = loader.load()
        if not same(loaded.tensors, expected.tensors):
            raise InternalError(f"{loader.name} and {loaders[0].name} loaded different tensors from the same weights")
        loaded.close()


def _probe(files: WeightFiles, profile: StorageProfile) -> float:
    """The disk alone: direct reads by as many threads as the profile says, into memory that is in use already."""
    drop_from_cache(files.safetensors)
    buffer = memoryview(aligned_buffer(files.num_bytes))
    buffer[:] = bytes(len(buffer))
    started_s = time.perf_counter()
    read_file(files.safetensors, buffer, profile=profile)
    return time.perf_counter() - started_s


def fill_cache(path: Path) -> None:
    """Read a file into the page cache, if it is not all there."""
    if resident_share(path) < 1:
        with path.open("rb", buffering=0) as file:
            piece = bytearray(1 << 22)
            while file.readinto(piece):
                pass


def _shuffled(loaders: Sequence[Loader], seed: int) -> list[Loader]:
    """Memory that one load gives back is what the next one gets, so none may always come right behind the same one."""
    return random.Random(seed).sample(loaders, len(loaders))


def _ms(times_s: Sequence[float]) -> str:
    return f"{median(times_s) * 1e3:.1f}"


def _gigabytes_s(size: SizeTimes, times_s: Sequence[float]) -> str:
    return f"{size.num_bytes / median(times_s) / 1e9:.2f}"


def _ratio(times_s: Sequence[float], ours_s: Sequence[float]) -> str:
    return f"{median(times_s) / median(ours_s):.2f}"
