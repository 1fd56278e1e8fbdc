"""`python -m rekindle.store.node --fd N --budget-bytes B`: the process that owns a machine's host-memory tier.

Objects are anonymous files, sealed against writing, that engines map: a model that wakes, or a second engine of it,
finds its weights as another left them, and adapters that engines had in their pools are brought back from here. The
process outlives engines and ends with its owner, the peer of socket N. A holder of leases is a connection, handed over
with `Attach`; its leases end when it does, however it ended.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import selectors
import signal
import socket
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import msgspec

from rekindle.clock import Clock, SystemClock
from rekindle.protocol.tiers import (
    MAX_MESSAGE_BYTES,
    Absent,
    AskSnapshot,
    Attach,
    Hold,
    Kept,
    Lease,
    Leased,
    Publish,
    Release,
    Reply,
    Request,
    Snapshot,
    SnapshotTaken,
)
from rekindle.store.anonymous_file import new_file
from rekindle.store.memory_tier import MemoryTier, TierObject
from rekindle.store.packing import Packed, Packer, WantedElsewhere

T = TypeVar("T")
_logger = logging.getLogger(__name__)

_NUM_WORKERS = 4
"""One packs; the others unpack as many objects at once."""


class TierNode:
    """Serves all connections in one thread, in which no message takes longer than its own handling; what takes longer
    is done by the packer in threads that tell when it is done."""

    def __init__(self, owner: socket.socket, budget_bytes: int, clock: Clock) -> None:
        self._owner = owner
        self._tier: MemoryTier[int] = MemoryTier(budget_bytes, clock, os.close)
        self._leases: dict[socket.socket, Counter[str]] = {}
        self._waiting: defaultdict[str, list[socket.socket]] = defaultdict(list)
        self._packer = Packer(clock)
        self._workers = ThreadPoolExecutor(_NUM_WORKERS)
        self._done: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(owner, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until the owner is gone."""
        while True:
            for key, _ in self._selector.select():
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._woken:
                    self._finish_work()
                elif not self._serve(connection):
                    if connection is self._owner:
                        return
                    self._part_with(connection)
            self._fit()

    def _serve(self, connection: socket.socket) -> bool:
        """Act on one message; False if the peer is gone, or does not speak as it should."""
        descriptors: list[int] = []
        try:
            message, descriptors, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
            if not message:
                return False
            self._act(connection, msgspec.msgpack.decode(message, type=Request), descriptors)
        except (OSError, msgspec.MsgspecError):
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _act(self, connection: socket.socket, request: Request, descriptors: list[int]) -> None:
        """What is kept of `descriptors` is taken out of it."""
        match request:
            case Attach() if connection is self._owner and descriptors:
                holder = socket.socket(fileno=descriptors.pop())
                holder.setblocking(False)
                self._leases[holder] = Counter()
                self._selector.register(holder, selectors.EVENT_READ)
            case AskSnapshot():
                _send_snapshot(connection, self._tier.snapshot())
            case Lease(name, takes_packed) if connection in self._leases:
                self._lease(connection, name, takes_packed)
            case Hold(name) if connection in self._leases:
                self._tier.hold(request)
                self._leases[connection][name] += 1
            case Release(name, is_damaged) if self._leases.get(connection, Counter())[name]:
                self._leases[connection][name] -= 1
                self._tier.release(Counter([name]))
                if is_damaged:
                    self._tier.lose(name)
            case Publish() if connection in self._leases and descriptors:
                is_first = self._tier.publish(request, descriptors[0])
                if is_first:
                    descriptors.pop()
                    self._leases[connection][request.name] += 1
                _send(connection, Kept(is_first))
            case _:
                raise msgspec.ValidationError(f"{type(request).__name__} is not for this connection to say")

    def _lease(self, holder: socket.socket, name: str, takes_packed: bool = False) -> None:
        held = self._tier.find(name)
        if held is None or held.handle is None:
            _send(holder, Absent())
        elif held.is_packed and not takes_packed:
            self._waiting[name].append(holder)
            if not held.is_moving:
                held.is_moving = True
                work = partial(self._packer.unpack, held.handle, held.kept_bytes)
                self._work(work, partial(self._unpacked, held))
        else:
            held.num_leases += 1
            self._leases[holder][name] += 1
            _send(holder, Leased(held.kept_bytes, held.is_packed), held.handle)

    def _fit(self) -> None:
        held = self._tier.fit()
        if held is None:
            return

        def is_wanted() -> bool:
            return held.num_leases > 0

        if held.handle is not None:
            # A copy of the descriptor, since the object may be leased and dropped before the thread looks at it.
            copy = os.dup(held.handle)
            self._work(partial(self._packer.pack, copy, held.made, is_wanted), partial(self._packed, held, copy))
        elif isinstance(held.made, Hold):
            self._work(partial(self._packer.read, held.made, is_wanted), partial(self._read, held))

    def _work(self, work: Callable[[], T], then: Callable[[T | Exception], None]) -> None:
        """Call `work` in a thread and then, in this one, `then` with what it gave or raised."""

        def run() -> None:
            try:
                result: T | Exception = work()
            except WantedElsewhere as error:
                result = error
            except Exception as error:
                _logger.exception("an object of the host-memory tier could not be moved")
                result = error
            self._done.put(partial(then, result))
            self._wake.send(b"1")

        self._workers.submit(run)

    def _finish_work(self) -> None:
        self._woken.recv(4096)
        while not self._done.empty():
            self._done.get()()

    def _packed(self, held: TierObject[int], copy: int, result: Packed | Exception) -> None:
        os.close(copy)
        match result:
            case Packed(descriptor, num_bytes, reasons) if descriptor is not None:
                self._tier.packed(held, descriptor, num_bytes, reasons)
            case Packed(_, _, reasons):
                self._tier.left_plain(held, reasons)
            case WantedElsewhere():
                self._tier.left_plain(held, ())
            case error:
                self._tier.left_plain(held, (f"packing failed: {error}",))

    def _read(self, held: TierObject[int], result: int | Exception) -> None:
        if isinstance(result, Exception):
            self._tier.not_kept(held)
        else:
            self._tier.kept(held, result)

    def _unpacked(self, held: TierObject[int], result: int | Exception) -> None:
        name = held.made.name
        if isinstance(result, Exception):
            self._tier.discard(held)
        else:
            self._tier.unpacked(held, result)
        for holder in self._waiting.pop(name, []):
            if holder not in self._leases:
                continue
            try:
                self._lease(holder, name)
            except OSError:
                self._part_with(holder)

    def _part_with(self, holder: socket.socket) -> None:
        """End a holder's leases; it may have gone already, when several things happen to it at once."""
        leases = self._leases.pop(holder, None)
        if leases is not None:
            self._selector.unregister(holder)
            holder.close()
            self._tier.release(leases)


def _send(connection: socket.socket, reply: Reply, *descriptors: int) -> None:
    socket.send_fds(connection, [msgspec.msgpack.encode(reply)], descriptors)


def _send_snapshot(connection: socket.socket, snapshot: Snapshot) -> None:
    content = msgspec.msgpack.encode(snapshot)
    with new_file(len(content)) as file:
        os.pwrite(file.descriptor, content, 0)
        _send(connection, SnapshotTaken(len(content)), file.descriptor)


def _open_as_many_files_as_allowed() -> None:
    """Each object takes a descriptor, and the usual limit is a thousand."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Run as the module says."""
    parser = argparse.ArgumentParser(prog="rekindle.store.node")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--budget-bytes", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _open_as_many_files_as_allowed()
    TierNode(socket.socket(fileno=arguments.fd), arguments.budget_bytes, SystemClock()).run()
    os._exit(0)  # without waiting for what threads are at


if __name__ == "__main__":
    main()
