"""How a thread that works beside the steps of a CPU gives way to them.

Priorities do not do it: the threads of a step wait for each other, so that it is late by whatever delays one of them,
and a thread of lower priority that has a core keeps it to the next tick, milliseconds later. So the thread works for a
fraction of a millisecond and then sleeps several times as long, as long as steps run.
"""

from __future__ import annotations

import threading
import time

_SHARE = 0.2
"""Of the time of one core, while steps run."""
_SLICE_S = 0.0002
"""How long the thread works in one go."""


class Pace:
    """`give_way` is called by the step loop, `rest` by the one thread that works beside it; `rested_s` is how long that
    has rested in all."""

    def __init__(self) -> None:
        self._is_quiet = threading.Event()
        self._is_quiet.set()
        self._since_s = 0.0
        self.rested_s = 0.0

    @property
    def is_quiet(self) -> bool:
        """Whether no steps run."""
        return self._is_quiet.is_set()

    def give_way(self, is_busy: bool) -> None:
        """Say whether steps run from now on."""
        if is_busy == self._is_quiet.is_set():
            (self._is_quiet.clear if is_busy else self._is_quiet.set)()

    def rest(self) -> None:
        """To be called after every little piece of work."""
        worked_s = time.thread_time() - self._since_s
        if worked_s >= _SLICE_S:
            if not self._is_quiet.is_set():
                started_s = time.monotonic()
                self._is_quiet.wait(worked_s * (1 / _SHARE - 1))
                self.rested_s += time.monotonic() - started_s
            self._since_s = time.thread_time()
