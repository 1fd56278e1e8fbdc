"""All settings of a server in one tree, and what the automatic ones resolve to on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from rekindle.config import Bytes, check_range, section, setting
from rekindle.errors import ConfigurationError
from rekindle.units import MIB

MAX_PORT = 65_535


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the server listens and what it accepts."""

    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.")
    adapter_roots: tuple[str, ...] = setting((), "Directories under which adapters may be registered over HTTP.")
    max_body_bytes: Bytes = setting(16 * MIB, "Largest accepted request body.")
    drain_s: float = setting(30.0, "Seconds that open requests get to finish after SIGTERM.")

    def __post_init__(self) -> None:
        check_range("port", self.port, 0, MAX_PORT)
        check_range("max_body_bytes", self.max_body_bytes, 1)
        check_range("drain_s", self.drain_s, 0)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How each engine runs."""

    device: str = setting("auto", "cpu, cuda, cuda:1 and so on, or auto for a GPU where there is one and Triton.")
    dtype: str = setting("auto", "Compute type: bfloat16, float32, or auto for bfloat16 where the device has it.")
    memory: Bytes | None = setting(
        None,
        "Bytes for weights, KV cache, adapters and merged weights of all models; half of the host's free memory, or "
        "nine tenths of a GPU's.",
    )
    threads: int | None = setting(None, "Threads of each engine; the machine's cores.")
    page_tokens: int = setting(16, "Tokens in one page of KV cache.")
    max_step_tokens: int = setting(512, "Most tokens computed in one step; bounds how long a prefill delays others.")
    max_sequences: int = setting(256, "Most sequences running at once.")
    max_queued: int = setting(1024, "Most sequences waiting; beyond that requests get 429.")
    deterministic: bool = setting(False, "Make text independent of what else runs, at some cost in speed.")
    merge: bool = setting(
        False,
        "Merge an adapter that owns most rows into the weights while that pays: in place on a GPU, on a CPU in copies.",
    )
    merge_bytes: Bytes = setting(
        0,
        "Most bytes of such copies in each engine on a CPU, out of `memory`; 0 with `merge` is as many as the weights "
        "take, and more than 0 switches `merge` on.",
    )
    keep_alive_s: float | None = setting(
        None, "Seconds without a request after which an engine is stopped until the next one comes; never if not set."
    )
    step_limit_s: float = setting(
        600.0, "Seconds an engine with work may say nothing before it is taken for hung; longer than any step."
    )

    def __post_init__(self) -> None:
        for name in ("page_tokens", "max_step_tokens", "max_sequences", "max_queued", "step_limit_s"):
            check_range(name, getattr(self, name), 1)
        check_range("merge_bytes", self.merge_bytes, 0)
        for name, least in (("memory", 1), ("threads", 1), ("keep_alive_s", 0)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least)


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What is kept for models that sleep."""

    idle_memory: Bytes | None = setting(
        None,
        "Bytes of host memory for weights that no engine uses, so that models wake without laying them out again; a "
        "quarter of the host's free memory.",
    )

    def __post_init__(self) -> None:
        if self.idle_memory is not None:
            check_range("idle_memory", self.idle_memory, 0)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything `rekindle serve` can be told."""

    server: ServerSettings = section(ServerSettings)
    engine: EngineOptions = section(EngineOptions)
    store: StoreOptions = section(StoreOptions)


def home_directory(asked: Path | None) -> Path:
    """`--home`, else $REKINDLE_HOME, else ~/.rekindle."""
    return (asked or Path(os.environ.get("REKINDLE_HOME") or "~/.rekindle")).expanduser()


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: the least of what the kernel and the control group report."""
    limits = [_meminfo_available(), _cgroup_left()]
    return min(limit for limit in limits if limit is not None)


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigurationError("/proc/meminfo does not state MemAvailable; set engine.memory")


def _cgroup_left() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - used, 0)
