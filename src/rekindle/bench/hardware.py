"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np

from rekindle.units import MIB

_READ_BYTES = 256 * MIB
_NUM_READS = 7


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine and its software. `read_bytes_s` is what `num_threads` threads read together from memory;
    `load_average` is that of the minute before."""

    cpu: str
    num_cores: int
    memory_bytes: int
    read_bytes_s: float
    num_threads: int
    load_average: float
    system: str
    python: str
    torch: str
    measured_at: str


def describe(num_threads: int) -> Hardware:
    """This machine, its memory's read rate measured now."""
    load_average = os.getloadavg()[0]
    return Hardware(
        cpu=_cpu_name(),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        read_bytes_s=read_rate(num_threads),
        num_threads=num_threads,
        load_average=load_average,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=version("torch"),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def read_rate(num_threads: int) -> float:
    """Bytes a second that the threads read together from memory far beyond the caches; the best of several reads."""
    parts = np.array_split(np.ones(_READ_BYTES // 8, np.int64), num_threads)
    durations_s = []
    with ThreadPoolExecutor(num_threads) as threads:
        for _ in range(_NUM_READS):
            started_s = time.perf_counter()
            list(threads.map(np.bitwise_or.reduce, parts))
            durations_s.append(time.perf_counter() - started_s)
    return _READ_BYTES / min(durations_s)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
