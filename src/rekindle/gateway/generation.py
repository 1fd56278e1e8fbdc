"""Runs the sequences of one client request side by side and hands their output over in the order it arrives.

Every sequence has one task that reads the replica; all write to one bounded mailbox. A client that reads slowly
therefore holds its tasks up, these leave the replica's own bounded stream unread, and nothing grows. What piles up in
the mailbox meanwhile is taken out at once and merged, so a slow reader gets fewer, larger pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from types import TracebackType

from rekindle.errors import StreamBroken
from rekindle.gateway.choice import Choice, Delta
from rekindle.gateway.metrics import RequestObserver
from rekindle.gateway.seams import Replica
from rekindle.protocol.generation import GenerateRequest

MAILBOX_DELTAS = 64


class Generation:
    """The running sequences of one request. Leaving the context aborts those that have not finished."""

    def __init__(
        self, replica: Replica, sequences: Sequence[tuple[GenerateRequest, Choice]], observer: RequestObserver
    ) -> None:
        self._replica = replica
        self._sequences = sequences
        self._observer = observer
        self._mailbox: asyncio.Queue[Delta | BaseException] = asyncio.Queue(MAILBOX_DELTAS)
        self._num_running = len(sequences)
        self._fault: BaseException | None = None
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Generation:
        self._readers = [asyncio.create_task(self._read(request, choice)) for request, choice in self._sequences]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def next_deltas(self) -> list[Delta]:
        """What has arrived since the last call, at most one delta for each choice; waits for the first. Empty once
        all sequences have finished. What arrived before a fault is handed over first; the next call raises.

        Raises:
            RekindleError: a sequence could not be started or carried on.
        """
        if self._fault is not None:
            raise self._fault
        if not self._num_running:
            return []
        merged: dict[int, Delta] = {}
        arrived = await self._mailbox.get()
        while True:
            if isinstance(arrived, BaseException):
                self._fault = arrived
                if merged:
                    return list(merged.values())
                raise arrived
            earlier = merged.get(arrived.index)
            merged[arrived.index] = arrived if earlier is None else earlier.followed_by(arrived)
            self._num_running -= arrived.finish_reason is not None
            if self._mailbox.empty():
                return list(merged.values())
            arrived = self._mailbox.get_nowait()

    async def _read(self, request: GenerateRequest, choice: Choice) -> None:
        try:
            async with aclosing(self._replica.generate(request)) as chunks:
                async for chunk in chunks:
                    num_before = choice.num_tokens
                    delta = choice.feed(chunk)
                    self._observer.tokens_arrived(choice.index, choice.num_tokens - num_before)
                    if delta is not None:
                        await self._mailbox.put(delta)
                    if choice.finished:
                        return
            raise StreamBroken(f"{request.request_id}: the replica's stream ended before the sequence did")
        except Exception as error:  # noqa: BLE001 - handed to the request's own task, which must not wait for ever
            await self._mailbox.put(error)
