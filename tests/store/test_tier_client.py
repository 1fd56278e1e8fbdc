"""An engine's side of the connection to the host-memory tier."""

from __future__ import annotations

import socket
import threading

import msgspec

from rekindle.protocol.tiers import Leased
from rekindle.store.tier_client import TierClient


def test_memory_whose_descriptor_is_lost_on_the_way_is_not_taken_for_zeros() -> None:
    """As it is where a process has as many files open as it may: the kernel delivers the message alone."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answer() -> None:
        theirs.recv(1000)
        theirs.send(msgspec.msgpack.encode(Leased(4096)))

    answering = threading.Thread(target=answer)
    with theirs:
        client = TierClient(ours)
        answering.start()
        assert client.lease("weights") is None
        answering.join()
        client.close()
