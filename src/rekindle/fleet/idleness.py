"""How long nobody has asked a replica anything."""

from __future__ import annotations

import asyncio
import contextlib
import math

from rekindle.clock import Clock


class Idleness:
    """Begins with `begin`, ends with `end`, and is long after `limit_s`. It has begun when this is made."""

    def __init__(self, clock: Clock, limit_s: float) -> None:
        self._clock, self._limit_s = clock, limit_s
        self._is_on, self._is_over = asyncio.Event(), asyncio.Event()
        self.begin()

    def begin(self) -> None:
        """Count from now on."""
        self._since_s = self._clock.monotonic_s()
        self._is_over.clear()
        self._is_on.set()

    def end(self) -> None:
        """Somebody asks something."""
        self._is_on.clear()
        self._is_over.set()

    async def until_over(self) -> None:
        """Return when somebody asks something; may be late for one who has gone again."""
        await self._is_over.wait()

    async def until_long(self) -> None:
        """Return when nobody has asked anything for long."""
        while True:
            await self._is_on.wait()
            left_s = self._since_s + self._limit_s - self._clock.monotonic_s()
            if self._is_on.is_set() and left_s <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if left_s == math.inf else left_s):
                    await self._is_over.wait()
