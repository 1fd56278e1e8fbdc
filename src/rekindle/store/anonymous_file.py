"""Anonymous files that are filled once, sealed, and then mapped by whoever gets the descriptor."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | 0x10  # F_SEAL_FUTURE_WRITE, not in fcntl yet


def seal(descriptor: int) -> None:
    """From now on nobody can write to the file or change its length; who maps it writable keeps that mapping."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)


class NewFile:
    """An anonymous file under construction, closed unless it is finished."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_finished = False

    def finish(self) -> int:
        """Seal it; returns the descriptor, now the caller's."""
        seal(self.descriptor)
        self.is_finished = True
        return self.descriptor


@contextmanager
def new_file(num_bytes: int) -> Iterator[NewFile]:
    """A file of so many bytes, all zero; what is not touched costs nothing."""
    file = NewFile(os.memfd_create("rekindle-object", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    try:
        os.ftruncate(file.descriptor, num_bytes)
        yield file
    finally:
        if not file.is_finished:
            os.close(file.descriptor)
