"""What the catalog needs of the store that holds the files its rows name."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from rekindle.protocol.identity import AdapterDigest, ModelDigest


class FileStore(Protocol):
    """Directories of models and adapter versions, named after their digests; a home directory is one."""

    @property
    def catalog(self) -> Path:
        """The database file."""
        ...

    @property
    def models(self) -> Path:
        """The directory that holds the models' directories."""
        ...

    @property
    def adapters(self) -> Path:
        """The directory that holds the adapter versions' directories."""
        ...

    def model_directory(self, digest: ModelDigest) -> Path:
        """Where that model lies, or would lie."""
        ...

    def adapter_directory(self, digest: AdapterDigest) -> Path:
        """Where that adapter version lies, or would lie."""
        ...

    def remove(self, directory: Path) -> None:
        """Remove a model's or adapter's directory at once."""
        ...

    def alone(self) -> AbstractContextManager[bool]:
        """Whether no process serves from these files or imports some; if so, none does before the context ends."""
        ...
