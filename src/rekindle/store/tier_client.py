"""An engine's connection to the host-memory tier: what others made is mapped, what it makes others may map.

Without a tier, or after it has died, an engine does what it would have done alone; so nothing here fails for it.
"""

from __future__ import annotations

import logging
import socket

import msgspec

from rekindle.protocol.tiers import MAX_MESSAGE_BYTES, Kept, Lease, Leased, Publish, Reply, Request

_logger = logging.getLogger(__name__)
_ANSWER_S = 60.0
"""What unpacking takes is included; an engine that waited in vain makes the object itself."""


class TierClient:
    """Holds leases until the process, or `close`, ends the connection. Calls block for moments."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection: socket.socket | None = connection
        connection.settimeout(_ANSWER_S)

    def lease(self, name: str) -> tuple[int, int] | None:
        """A descriptor of the object's memory, now the caller's, and its size; None if it cannot be had."""
        match self._ask(Lease(name)):
            case Leased(num_bytes), descriptor:
                return descriptor, num_bytes
        return None

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

    def _ask(self, request: Request, *descriptors: int) -> tuple[Reply, int] | None:
        """The reply and the descriptor that came with it, -1 if none did; None if there is no tier."""
        if self._connection is None:
            return None
        try:
            socket.send_fds(self._connection, [msgspec.msgpack.encode(request)], descriptors)
            message, received, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE_BYTES, 1)
            if not message:
                raise ConnectionResetError("it has ended")
            reply = msgspec.msgpack.decode(message, type=Reply)
            if isinstance(reply, Leased) and not received:
                raise ConnectionError("no descriptor could be received")  # too many are open here
            return reply, received[0] if received else -1
        except (OSError, msgspec.MsgspecError) as error:
            _logger.warning("the host-memory tier cannot be used any more: %s", error)
            self.close()
            return None
