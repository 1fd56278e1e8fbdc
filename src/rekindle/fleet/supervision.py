"""How patient a replica is with its engine, and when a dead one is started again. Pure decisions."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MAX_DOUBLINGS = 20


@dataclass(frozen=True, slots=True)
class Supervision:
    """Deadlines and limits.

    `start_s` is how long an engine may take to start. One that has requests and sends nothing for `silence_s` is taken
    for hung and killed; it must exceed the longest step. `stop_s` is how long it gets to exit when told to.

    An engine that died before it gave a token was fruitless. A fruitful one is replaced at once; after the nth
    fruitless one in a row and within `window_s`, the replica waits `backoff_s` doubled n - 1 times, at most
    `max_backoff_s`. From the `max_fruitless_crashes`th on it refuses requests while it waits and starts. A request
    blamed for `max_crashes_per_request` crashes is given up.

    An engine that nobody has asked anything for `keep_alive_s` is stopped; it is started again with the next request.
    """

    start_s: float = 300.0
    silence_s: float = 600.0
    stop_s: float = 5.0
    backoff_s: float = 0.25
    max_backoff_s: float = 15.0
    window_s: float = 300.0
    max_fruitless_crashes: int = 4
    max_crashes_per_request: int = 2
    keep_alive_s: float = math.inf


class RestartPolicy:
    """Counts crashes and says how long to wait before the next start."""

    def __init__(self, supervision: Supervision) -> None:
        self._supervision = supervision
        self._fruitless_s: list[float] = []
        self._next_start_s = 0.0

    @property
    def is_hopeless(self) -> bool:
        """Whether so many engines have died in vain that requests had better go elsewhere."""
        return len(self._fruitless_s) >= self._supervision.max_fruitless_crashes

    def crashed(self, now_s: float, *, was_fruitful: bool) -> float:
        """An engine has died; `was_fruitful` if it gave a token. Returns the seconds to wait before the next start."""
        limits = self._supervision
        if was_fruitful:
            self._fruitless_s.clear()
            delay_s = 0.0
        else:
            self._fruitless_s = [then_s for then_s in self._fruitless_s if now_s - then_s <= limits.window_s]
            num_doublings = min(len(self._fruitless_s), _MAX_DOUBLINGS)
            self._fruitless_s.append(now_s)
            delay_s = min(limits.backoff_s * 2**num_doublings, limits.max_backoff_s)
        self._next_start_s = now_s + delay_s
        return delay_s

    def retry_after_s(self, now_s: float) -> float:
        """Advice to who is refused meanwhile: the rest of the wait and a little for the start itself."""
        return max(self._next_start_s - now_s, 0.0) + 1.0
