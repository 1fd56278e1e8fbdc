"""An engine's connection to the host-memory tier: what others made is mapped, what it makes others may map.

Without a tier, or after it has died, an engine does what it would have done alone; so nothing here fails for it.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass

import msgspec

from rekindle.protocol.tiers import (
    MAX_MESSAGE_BYTES,
    Hold,
    Kept,
    Lease,
    Leased,
    Publish,
    Release,
    Reply,
    Request,
)

_logger = logging.getLogger(__name__)
_ANSWER_S = 60.0
"""What unpacking takes is included; an engine that waited in vain makes the object itself."""


@dataclass(frozen=True, slots=True)
class Copy:
    """An object as host memory keeps it: an anonymous file of so many bytes, packed or not. The descriptor is the
    receiver's."""

    descriptor: int
    num_bytes: int
    is_packed: bool


class TierClient:
    """Holds leases until they are released, or the process or `close` ends the connection. Calls block for moments; one
    thread at a time may make them."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection: socket.socket | None = connection
        connection.settimeout(_ANSWER_S)

    def lease(self, name: str) -> tuple[int, int] | None:
        """A descriptor of the object's memory, now the caller's, and its size; None if it cannot be had."""
        copy = self.lease_copy(name, takes_packed=False)
        return None if copy is None else (copy.descriptor, copy.num_bytes)

    def lease_copy(self, name: str, *, takes_packed: bool = True) -> Copy | None:
        """The object as it is kept; None if it cannot be had."""
        match self._ask(Lease(name, takes_packed)):
            case Leased(kept_bytes, is_packed), descriptor:
                return Copy(descriptor, kept_bytes, is_packed)
        return None

    def hold(self, held: Hold) -> None:
        """Say that this process has an object in memory of its own, which counts as a lease."""
        self._tell(held)

    def release(self, name: str, *, is_damaged: bool = False) -> None:
        """Give one lease back; `is_damaged` drops what was given for it."""
        self._tell(Release(name, is_damaged))

    def publish(self, made: Publish, descriptor: int) -> bool:
        """Offer an object; returns whether the tier now keeps it. The caller keeps its descriptor."""
        match self._ask(made, descriptor):
            case Kept(is_first), _:
                return is_first
        return False

    def close(self) -> None:
        """Give all leases back."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _tell(self, request: Request, *descriptors: int) -> bool:
        """Send a message; False if there is no tier."""
        if self._connection is None:
            return False
        try:
            socket.send_fds(self._connection, [msgspec.msgpack.encode(request)], descriptors)
        except OSError as error:
            self._lose(error)
            return False
        return True

    def _ask(self, request: Request, *descriptors: int) -> tuple[Reply, int] | None:
        """The reply and the descriptor that came with it, -1 if none did; None if there is no tier."""
        if not self._tell(request, *descriptors) or self._connection is None:
            return None
        try:
            message, received, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE_BYTES, 1)
            if not message:
                raise ConnectionResetError("it has ended")
            reply = msgspec.msgpack.decode(message, type=Reply)
            if isinstance(reply, Leased) and not received:
                raise ConnectionError("no descriptor could be received")  # too many are open here
            return reply, received[0] if received else -1
        except (OSError, msgspec.MsgspecError) as error:
            self._lose(error)
            return None

    def _lose(self, error: Exception) -> None:
        _logger.warning("the host-memory tier cannot be used any more: %s", error)
        self.close()
