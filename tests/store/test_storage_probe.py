"""The probe of a filesystem: what it finds, which choice it makes of it, and what it leaves behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from rekindle.errors import ConfigurationError
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile
from rekindle.store import storage_probe
from rekindle.store.storage_probe import probe_storage
from rekindle.units import MIB


def rates(monkeypatch: pytest.MonkeyPatch, direct: dict[tuple[int, int], float]) -> list[int]:
    """Let disks read at these rates by threads and MiB at once, 1 GB/s otherwise; returns how much each read is."""
    sizes: list[int] = []

    def rate(path: Path, buffer: memoryview, profile: StorageProfile) -> tuple[float, bool]:
        sizes.append(len(buffer))
        if profile.prefers_cache:
            return 9e9, True
        return direct.get((profile.num_threads, profile.chunk_bytes // MIB), 1e9), True

    monkeypatch.setattr(storage_probe, "_rate", rate)
    return sizes


def test_a_probe_measures_both_rates_and_removes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_probe, "PROBE_BYTES", 16 * MIB)
    try:
        probe = tmp_path / "probe"
        probe.touch()
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
        probe.unlink()
    except OSError:
        pytest.skip("the filesystem of temporary files takes no direct reads")
    profile = probe_storage(tmp_path)
    assert profile.direct_bytes_s is not None and profile.direct_bytes_s > 0
    assert profile.cached_bytes_s is not None and profile.cached_bytes_s > 0
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_without_direct_reads_gets_the_default_and_no_made_up_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_probe, "PROBE_BYTES", 16 * MIB)
    real_open = os.open

    def refusing(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    assert probe_storage(tmp_path) == DEFAULT_PROFILE


@pytest.mark.parametrize(
    ("direct", "best"),
    [
        ({(8, 1): 3e9, (16, 4): 3.1e9}, (8, 1, 3.1e9)),  # 16 threads gain too little
        ({(8, 1): 3e9, (16, 4): 3.5e9}, (16, 4, 3.5e9)),
        ({(16, 4): 3e9}, (4, 1, 1e9)),  # nothing gained from 4 to 8 threads, so 16 are not tried
        ({(4, 4): 3e9}, (4, 4, 3e9)),
    ],
)
def test_the_fewest_threads_that_reach_the_disks_rate_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: dict[tuple[int, int], float], best: tuple[int, int, float]
) -> None:
    rates(monkeypatch, direct)
    num_threads, chunk_mib, rate = best
    assert probe_storage(tmp_path) == StorageProfile(chunk_mib * MIB, num_threads, rate, 9e9)


def test_a_slow_disk_is_measured_with_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = rates(monkeypatch, {(4, 4): 1e8})
    probe_storage(tmp_path)
    assert min(sizes) == 16 * MIB


def test_a_directory_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="absent cannot be measured"):
        probe_storage(tmp_path / "absent")


def test_a_profile_can_be_stored_and_a_stored_one_is_checked(tmp_path: Path) -> None:
    profile = StorageProfile(MIB, 8, 2e9, 9e9)
    raw = msgspec.json.encode(profile)
    assert msgspec.json.decode(raw, type=StorageProfile) == profile
    with pytest.raises(msgspec.ValidationError, match="num_threads is 0"):
        msgspec.json.decode(raw.replace(b'"num_threads":8', b'"num_threads":0'), type=StorageProfile)
