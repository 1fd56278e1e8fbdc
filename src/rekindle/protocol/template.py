"""What an engine template says to the process that wants engines of it."""

from __future__ import annotations

import msgspec

MAX_MESSAGE_BYTES = 1024


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Everything is imported."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """An engine was started; its pidfd comes with the message."""

    pid: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """An engine has ended with this status; negative, it is the number of the signal that killed it."""

    pid: int
    status: int


Answer = Ready | Forked | Ended
