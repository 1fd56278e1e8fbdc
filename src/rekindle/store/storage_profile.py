"""The measured profile of the filesystem that holds a home, kept there for all who read from it.

The file tells which filesystem it is about; on another one, as after a home was moved, it counts for nothing, as does
one that cannot be understood.
"""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from rekindle.errors import ConfigurationError
from rekindle.protocol.storage import DEFAULT_PROFILE, StorageProfile

PROFILE_NAME = "storage.json"


class KeptProfile(msgspec.Struct, frozen=True):
    """A profile, when it was measured, and of what: the filesystem's device number and type."""

    device: int
    filesystem: str
    measured: datetime
    profile: StorageProfile


def kept_profile(home: Path) -> KeptProfile | None:
    """The profile kept in `home`; None if there is none of the filesystem that holds it."""
    try:
        kept = msgspec.json.decode((home / PROFILE_NAME).read_bytes(), type=KeptProfile)
        return kept if (kept.device, kept.filesystem) == _identity(home) else None
    except (OSError, msgspec.MsgspecError):
        return None


def profile_of(home: Path) -> StorageProfile:
    """The profile kept in `home`, or the usual one."""
    kept = kept_profile(home)
    return DEFAULT_PROFILE if kept is None else kept.profile


def keep_profile(home: Path, profile: StorageProfile, unix_s: float) -> None:
    """Keep a profile of the filesystem that holds `home`, measured at that time, in place of any other.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    measured = datetime.fromtimestamp(int(unix_s), UTC)
    raw = msgspec.json.format(msgspec.json.encode(KeptProfile(*_identity(home), measured, profile)))
    written = home / f"{PROFILE_NAME}.{os.getpid()}"
    try:
        written.write_bytes(raw)
        written.replace(home / PROFILE_NAME)
    except OSError as error:
        written.unlink(missing_ok=True)
        raise ConfigurationError(f"the profile of the disk cannot be kept in {home}: {error}") from error


def holds(home: Path, directory: Path) -> bool:
    """Whether `home` is there, and on the filesystem that `directory` is on."""
    try:
        return home.stat().st_dev == directory.stat().st_dev
    except OSError:
        return False


def _identity(directory: Path) -> tuple[int, str]:
    """Device number and type of the filesystem that holds a directory; the type is "" where it cannot be told."""
    device = directory.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == number:
                return device, rest.split()[0]
    return device, ""
