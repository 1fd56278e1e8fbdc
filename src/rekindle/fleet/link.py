"""One engine process: its start, the socket to it, its log, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Coroutine
from typing import Any

from rekindle.errors import InternalError
from rekindle.fleet.control import ChildProcess, LaunchFailed
from rekindle.fleet.launch import Launcher
from rekindle.protocol.replica import Shutdown
from rekindle.protocol.wire import HEADER, Message, WireError, decode, encode, parse_header

LOG_LINE_BYTES = 16 << 10
"""Longer lines of an engine's log are cut into several."""

_REAP_S = 10.0

_logger = logging.getLogger(__name__)
_engine_logger = logging.getLogger("rekindle.engine")


class EngineLost(InternalError):
    """The engine has died, or must; `is_configuration` if another one cannot do better."""

    def __init__(self, message: str, *, is_configuration: bool = False) -> None:
        super().__init__(message)
        self.is_configuration = is_configuration


class EngineLink:
    """A running engine process, spoken to in frames. Made by `spawn`; `close` must be awaited in the end.

    What it writes to its standard error goes to the logger `rekindle.engine`, line by line.
    """

    def __init__(
        self,
        process: ChildProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: asyncio.StreamReader,
        log_pipe: asyncio.BaseTransport,
    ) -> None:
        self._process, self._reader, self._writer, self._log_pipe = process, reader, writer, log_pipe
        self._log_relay = asyncio.create_task(_relay_log(log, process.pid), name="engine-log-relay")

    @classmethod
    async def spawn(cls, launcher: Launcher) -> EngineLink:
        """Launch an engine with its end of a fresh socket pair; leaves nothing behind if cancelled.

        Raises:
            EngineLost: it cannot be launched.
        """
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as undo:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            undo.callback(writer.transport.abort)
            log, log_pipe, log_end = await _log_pipe()
            undo.callback(log_pipe.close)
            try:
                process = await launcher.launch(theirs, log_end)
            except LaunchFailed as error:
                raise EngineLost(str(error)) from error
            finally:
                os.close(log_end)
            undo.pop_all()
        return cls(process, reader, writer, log, log_pipe)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, message: Message) -> None:
        """Send a frame; waits while the engine takes nothing. What a dead engine does not get is no error here:
        `receive` tells of its death.

        Raises:
            WireError: the message cannot be sent.
        """
        frame = encode(message)
        if not self._writer.is_closing():
            self._writer.write(frame)
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()

    async def receive(self) -> Message:
        """The next frame.

        Raises:
            EngineLost: there is none: the process has died, or does not speak this protocol.
        """
        try:
            length, tag = parse_header(await self._reader.readexactly(HEADER.size))
            return decode(tag, await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EngineLost(await self._how_it_ended()) from error
        except WireError as error:
            raise EngineLost(str(error)) from error

    async def close(self, grace_s: float) -> None:
        """End the process, if need be by force after `grace_s`, and release everything, even if cancelled meanwhile."""
        await _to_the_end(self._close(grace_s))

    async def _close(self, grace_s: float) -> None:
        if grace_s > 0 and not self._writer.is_closing():
            self._writer.write(encode(Shutdown()))
        if not await self._has_exited_within(grace_s):
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            if not await self._has_exited_within(_REAP_S):
                _logger.error("engine process %d does not die; it is left behind", self.pid)
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        _, unread = await asyncio.wait([self._log_relay], timeout=_REAP_S)
        for task in unread:
            task.cancel()
        self._log_pipe.close()

    async def _has_exited_within(self, limit_s: float) -> bool:
        try:
            await asyncio.wait_for(self._process.wait(), limit_s)
        except TimeoutError:
            return False
        return True

    async def _how_it_ended(self) -> str:
        """The engine's end of the socket is closed; its exit follows, or does not count."""
        if not await self._has_exited_within(1.0):
            return f"engine process {self.pid} closed its connection"
        status = self._process.returncode
        if status is None:
            return f"engine process {self.pid} has ended"
        if status < 0:
            return f"engine process {self.pid} was killed by {signal.Signals(-status).name}"
        return f"engine process {self.pid} exited with status {status}"


async def _log_pipe() -> tuple[asyncio.StreamReader, asyncio.BaseTransport, int]:
    """What comes out of a pipe, the transport that brings it, and the descriptor that goes into it."""
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    try:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb", buffering=0)
        )
    except BaseException:
        os.close(theirs)
        raise
    return reader, transport, theirs


async def _relay_log(stream: asyncio.StreamReader, pid: int) -> None:
    """Pass lines on at the level they begin with, else as warnings, until the stream ends."""
    rest = b""
    while data := await stream.read(LOG_LINE_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) >= LOG_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _log_line(line, pid)
    if rest:
        _log_line(rest, pid)


def _log_line(line: bytes, pid: int) -> None:
    text = line.decode(errors="replace").rstrip()
    name, _, message = text.partition(" ")
    level = logging.getLevelNamesMapping().get(name)
    if level is None:
        level, message = logging.WARNING, text
    if message:
        _engine_logger.log(level, "[%d] %s", pid, message)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await something that must not be left half done; a cancellation is passed on when it is."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
