"""The machine's host-memory tier as its owner sees it: a process that engines are connected to and that outlives them.

Should it die, engines keep what they have mapped and go on; the next engine gets a new, empty one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys

import msgspec

from rekindle.fleet.control import Answers, BegunHelper, Helper, LaunchFailed
from rekindle.protocol.tiers import MAX_MESSAGE_BYTES, AskSnapshot, Attach, Reply, Snapshot, SnapshotTaken

_logger = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "rekindle.store.node")
_ANSWER_S = 10.0


class HostMemoryNode:
    """Keeps up to `budget_bytes` of objects that nobody uses. All methods belong to one event loop; `close` must be
    awaited in the end."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._helper: Helper | None = None
        self._lock = asyncio.Lock()
        self._snapshots: Answers[Snapshot] = Answers("the host-memory tier")

    async def connect(self) -> socket.socket:
        """A connection for one holder of leases, to be handed on.

        Raises:
            LaunchFailed: the process cannot be started.
        """
        async with self._lock:
            helper = await self._running()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    helper.send(msgspec.msgpack.encode(Attach()), [theirs.fileno()])
                except BaseException:
                    ours.close()
                    raise
            return ours

    async def snapshot(self) -> Snapshot:
        """What is in the tier now; an empty one if there is no process, or none that answers."""
        helper = self._helper
        if helper is not None and not helper.is_lost:
            try:
                helper.send(msgspec.msgpack.encode(AskSnapshot()))
                return await self._snapshots.next(_ANSWER_S)
            except LaunchFailed as error:
                _logger.error("what is in host memory cannot be told: %s", error)
                helper.give_up()
        return Snapshot(self._budget_bytes, 0, (), 0, 0, 0)

    async def close(self) -> None:
        """End the process; memory that engines have mapped stays theirs."""
        async with self._lock:
            helper, self._helper = self._helper, None
            if helper is not None:
                await helper.close()

    async def _running(self) -> Helper:
        if self._helper is None or self._helper.is_lost:
            if self._helper is not None:
                await self._helper.close()
            begun = BegunHelper((*_COMMAND, "--budget-bytes", str(self._budget_bytes)))
            self._helper = Helper(begun, MAX_MESSAGE_BYTES, self._heed, self._snapshots.fail)
        return self._helper

    def _heed(self, message: bytes, descriptors: list[int]) -> None:
        try:
            match msgspec.msgpack.decode(message, type=Reply), descriptors:
                case SnapshotTaken(num_bytes), [descriptor]:
                    content = os.pread(descriptor, num_bytes, 0)
                    self._snapshots.give(msgspec.msgpack.decode(content, type=Snapshot))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
