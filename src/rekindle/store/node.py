"""`python -m rekindle.store.node --fd N --budget-bytes B`: the process that owns a machine's host-memory tier.

Objects are anonymous files, sealed against writing, that engines map: a model that wakes, or a second engine of it,
finds its weights as another left them. The process outlives engines and ends with its owner, the peer of socket N. A
holder of leases is a connection, handed over with `Attach`; its leases end when it does, however it ended.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import socket
from collections import Counter

import msgspec

from rekindle.clock import Clock, SystemClock
from rekindle.protocol.tiers import (
    MAX_MESSAGE_BYTES,
    Absent,
    AskSnapshot,
    Attach,
    Kept,
    Lease,
    Leased,
    Publish,
    Reply,
    Request,
)
from rekindle.store.memory_tier import MemoryTier


class TierNode:
    """Serves all connections in one thread: no request takes longer than its own message."""

    def __init__(self, owner: socket.socket, budget_bytes: int, clock: Clock) -> None:
        self._owner = owner
        self._tier: MemoryTier[int] = MemoryTier(budget_bytes, clock, os.close)
        self._leases: dict[socket.socket, Counter[str]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(owner, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the owner is gone."""
        while True:
            for key, _ in self._selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if not self._serve(connection):
                    if connection is self._owner:
                        return
                    self._part_with(connection)

    def _serve(self, connection: socket.socket) -> bool:
        """Answer one message; False if the peer is gone, or does not speak as it should."""
        descriptors: list[int] = []
        try:
            message, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
            if not message:
                return False
            reply, memory = self._act(connection, msgspec.msgpack.decode(message, type=Request), descriptors)
            if reply is not None:
                socket.send_fds(connection, [msgspec.msgpack.encode(reply)], memory)
        except (OSError, msgspec.MsgspecError):
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _act(
        self, connection: socket.socket, request: Request, descriptors: list[int]
    ) -> tuple[Reply | None, list[int]]:
        """The reply, and the descriptors that go with it. What is kept of `descriptors` is taken out of it."""
        match request:
            case Attach() if connection is self._owner and descriptors:
                holder = socket.socket(fileno=descriptors.pop())
                self._leases[holder] = Counter()
                self._selector.register(holder, selectors.EVENT_READ)
                return None, []
            case AskSnapshot():
                return self._tier.snapshot(), []
            case Lease(name) if connection in self._leases:
                found = self._tier.lease(name)
                if found is None:
                    return Absent(), []
                self._leases[connection][name] += 1
                return Leased(found[1]), [found[0]]
            case Publish(name, num_bytes) if connection in self._leases and descriptors:
                is_first = self._tier.publish(name, descriptors[0], num_bytes)
                if is_first:
                    descriptors.pop()
                    self._leases[connection][name] += 1
                return Kept(is_first), []
        raise msgspec.ValidationError(f"{type(request).__name__} is not for this connection to say")

    def _part_with(self, holder: socket.socket) -> None:
        self._selector.unregister(holder)
        holder.close()
        self._tier.release(self._leases.pop(holder))


def main() -> None:
    """Run as the module says."""
    parser = argparse.ArgumentParser(prog="rekindle.store.node")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--budget-bytes", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=arguments.fd) as owner:
        TierNode(owner, arguments.budget_bytes, SystemClock()).run()


if __name__ == "__main__":
    main()
