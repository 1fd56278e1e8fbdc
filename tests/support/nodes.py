"""Processes that own host memory, and holders of leases on what is in it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from rekindle.fleet.host_memory import HostMemoryNode
from rekindle.protocol.tiers import Snapshot
from rekindle.store.tier_client import TierClient
from rekindle.units import MIB


class Node(HostMemoryNode):
    """Closes in the end what the test has connected."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(budget_bytes)
        self.clients: list[TierClient] = []

    @property
    def pid(self) -> int:
        assert self._helper is not None
        return self._helper._process.pid

    async def until(self, is_so: Callable[[Snapshot], bool]) -> Snapshot:
        """The first snapshot of which something holds."""
        async with asyncio.timeout(60):
            while not is_so(snapshot := await self.snapshot()):
                await asyncio.sleep(0.01)
            return snapshot


@asynccontextmanager
async def node(budget_bytes: int = 64 * MIB) -> AsyncIterator[Node]:
    ours = Node(budget_bytes)
    try:
        yield ours
    finally:
        for connected in ours.clients:
            connected.close()
        await ours.close()


async def client(of: Node) -> TierClient:
    of.clients.append(TierClient(await of.connect()))
    return of.clients[-1]
