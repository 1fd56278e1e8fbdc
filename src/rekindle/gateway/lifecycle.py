"""Draining: a server that is about to stop takes nothing new and finishes what it has begun."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from rekindle.errors import ReplicaUnavailable


class Lifecycle:
    """Counts the work in progress; used from the server's event loop only."""

    def __init__(self) -> None:
        self._draining = False
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def num_active(self) -> int:
        """Generations and registrations in progress."""
        return self._num_active

    def begin_draining(self) -> None:
        """From now on refuse new work."""
        self._draining = True

    async def idle(self) -> None:
        """Wait until nothing is in progress."""
        await self._idle.wait()

    @contextmanager
    def work(self, retry_after_s: float) -> Iterator[None]:
        """Count one piece of work while it lasts.

        Raises:
            ReplicaUnavailable: the server is draining.
        """
        if self._draining:
            raise ReplicaUnavailable("the server is shutting down; send the request again", retry_after_s=retry_after_s)
        self._num_active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_active -= 1
            if not self._num_active:
                self._idle.set()
