"""The home directory: where imported models and adapters lie, and how they get there whole or not at all.

    catalog.db             what exists, by name; beside it the database's own catalog.db-wal and catalog.db-shm
    catalog.lock           held for moments, while the catalog is opened
    models/<digest>/       one imported base model
    adapters/<digest>/     one adapter version
    storage.json           how to read from the filesystem that holds all this, once it was measured
    tmp/                   directories being built or removed
    lock                   held for moments, while an entry of tmp/ is created or swept
    users.lock             shared by all processes that serve from this home or import into it

A directory is built under tmp/, synced, and renamed into place, so that a process killed at any moment leaves either
the whole or nothing but an entry in tmp/. The builder holds a lock on that entry, which ends with the process; entries
that nobody locks are swept when a home is opened.

What nobody needs any more is deleted by a process that has users.lock for itself. A name in the catalog is not enough
to go by: a server runs on a version whose name is gone until its last request ends, reading its file again after an
eviction, and an import has no name until its files are complete.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rekindle.errors import ConfigurationError
from rekindle.protocol.identity import AdapterDigest, ModelDigest
from rekindle.units import format_bytes

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class StagedDirectory:
    """A directory under construction: fill `path`, then `publish` it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def publish(self, target: Path) -> None:
        """Sync everything in `path` and rename it to `target`, which is named after its content.

        If `target` exists already it is kept, and this copy is dropped.
        """
        _sync_tree(self.path)
        try:
            self.path.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _sync(target.parent)


class Home:
    """One home directory, created if it does not exist.

    Raises:
        ConfigurationError: the directory cannot be created or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.models = self.root / "models"
        self.adapters = self.root / "adapters"
        self.temporary = self.root / "tmp"
        self.catalog = self.root / "catalog.db"
        self._lock = self.root / "lock"
        self._users_lock = self.root / "users.lock"
        try:
            for directory in (self.models, self.adapters, self.temporary):
                directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise ConfigurationError(
                f"the home directory {self.root} cannot be used: {error.strerror}; choose another with --home or "
                "REKINDLE_HOME"
            ) from error

    def model_directory(self, digest: ModelDigest) -> Path:
        """Where that model lies, or would lie."""
        return self.models / digest

    def adapter_directory(self, digest: AdapterDigest) -> Path:
        """Where that adapter version lies, or would lie."""
        return self.adapters / digest

    @contextmanager
    def using(self) -> Iterator[None]:
        """Keep every model and adapter version on disk while the context lasts.

        For a server while it runs, and for an import until its name is in the catalog. Waits while another process has
        the home `alone`; the lock ends with the process.
        """
        with _locked(self._users_lock, fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether no process is `using` this home; if so, those that want to wait until the context ends."""
        with ExitStack() as stack:
            try:
                stack.enter_context(_locked(self._users_lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
                is_alone = True
            except BlockingIOError:
                is_alone = False
            yield is_alone

    @contextmanager
    def atomic_directory(self) -> Iterator[StagedDirectory]:
        """Give an empty directory on the home's filesystem; what is not published at the end is removed.

        Raises:
            ConfigurationError: the disk filled up meanwhile.
        """
        path, descriptor = self._create_locked()
        try:
            yield StagedDirectory(path)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            free = format_bytes(shutil.disk_usage(self.root).free)
            raise ConfigurationError(
                f"the disk that holds {self.root} is full ({free} free before the unfinished copy is removed); "
                "free space, or choose another home with --home"
            ) from error
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(descriptor)

    def remove(self, directory: Path) -> None:
        """Remove a model's or adapter's directory: its name is gone at once, its bytes right after."""
        with self.atomic_directory() as staging:
            directory.rename(staging.path / directory.name)
            _sync(directory.parent)

    def require_free(self, num_bytes: int) -> None:
        """Raise `ConfigurationError` unless the disk has `num_bytes` free."""
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise ConfigurationError(
                f"the disk that holds {self.root} has {format_bytes(free)} free and {format_bytes(num_bytes)} are "
                "needed; free space, or choose another home with --home"
            )

    def _create_locked(self) -> tuple[Path, int]:
        with _locked(self._lock, fcntl.LOCK_EX):
            path = Path(tempfile.mkdtemp(dir=self.temporary))
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.chmod(0o755)
            return path, descriptor

    def _sweep(self) -> None:
        with _locked(self._lock, fcntl.LOCK_EX):
            for path in self.temporary.iterdir():
                if path.is_symlink() or not path.is_dir():
                    path.unlink(missing_ok=True)
                else:
                    _remove_unless_locked(path)


@contextmanager
def _locked(path: Path, operation: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, operation)
        yield
    finally:
        os.close(descriptor)


def _remove_unless_locked(directory: Path) -> None:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            _sync(Path(directory, name))
        _sync(Path(directory))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
