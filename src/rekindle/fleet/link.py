"""One engine process and the socket to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence

from rekindle.protocol.wire import HEADER, Message, decode, encode, parse_header

EXIT_DEADLINE_S = 5.0
_ENVIRONMENT = {"GOMP_SPINCOUNT": "1000"}
"""How long threads of an engine that wait for each other spin before they sleep. The default, milliseconds, multiplies
the time of a step as soon as the gateway or anything else wants a core; none at all costs a wake-up per operation."""


class EngineLink:
    """A running engine process, spoken to in frames. Made by `spawn`, ended by `close`."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineLink:
        """Start `command --fd N`, where N is its end of a fresh socket pair; raises `OSError` if that fails."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--fd",
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    env={**_ENVIRONMENT, **os.environ},
                )
            except OSError:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Message) -> None:
        """Queue a frame; what an engine that has just died does not get, its successor will."""
        if not self._writer.is_closing():
            self._writer.write(encode(message))

    async def flush(self) -> None:
        """Wait until the engine has taken most of what was sent."""
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    async def receive(self) -> Message | None:
        """The next frame; None when the engine's end is closed."""
        try:
            length, tag = parse_header(await self._reader.readexactly(HEADER.size))
            return decode(tag, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def kill(self) -> None:
        """End the process at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> int:
        """Close the socket, which ends the process, and wait for that; returns its exit code."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        try:
            return await asyncio.wait_for(self._process.wait(), EXIT_DEADLINE_S)
        except TimeoutError:
            self.kill()
            return await self._process.wait()
