"""Threads for one kind of blocking work, apart from those of others.

The event loop's default threads answer what every request needs, the names of models. Work that may take long or comes
from outside (templates, encoding, imports) has threads of its own, so that it can wait for itself only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class WorkerThreads:
    """Up to `num_threads` threads, started when needed. Calls beyond that wait in the order they came."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a blocking call; its errors are raised."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(function, *args, **kwargs))
