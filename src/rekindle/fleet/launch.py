"""How an engine's process comes to be: by running a command, or as a fork of a template that has everything imported.

Either way it is the leader of a session of its own, so that signals meant for this process's group do not reach it, its
connection is the given socket, and what it writes to its standard error goes to the given descriptor.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Protocol

import msgspec

from rekindle.fleet.control import BegunHelper, ChildProcess, Helper, LaunchFailed, run_command
from rekindle.fleet.host_memory import HostMemoryNode
from rekindle.protocol.template import MAX_MESSAGE_BYTES, Answer, Ended, Forked, Ready

ENGINE_COMMAND = (sys.executable, "-m", "rekindle.engine")
TEMPLATE_COMMAND = (sys.executable, "-m", "rekindle.engine.template")

_START_S, _FORK_S = 120.0, 30.0
"""How long a template may take to import everything, and to fork."""


class Launcher(Protocol):
    """Starts engines. What it returns has to be waited for in the end."""

    async def launch(self, connection: socket.socket, log: int) -> ChildProcess:
        """Start an engine; the caller keeps, and closes, its copies of the descriptors.

        Raises:
            LaunchFailed: it cannot be started.
        """
        ...


class CommandLauncher:
    """Runs `command --fd N`."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._command = tuple(command)

    async def launch(self, connection: socket.socket, log: int) -> ChildProcess:
        descriptor = connection.fileno()
        return await run_command((*self._command, "--fd", str(descriptor)), [descriptor], log)


class TemplateLauncher:
    """Forks engines off one template process, which is started when the first engine is unless it was `begun` before,
    and again should it die. With a `node`, engines share memory through it.

    All methods belong to one event loop. `close` must be awaited in the end; engines live on.
    """

    def __init__(
        self,
        command: Sequence[str] = TEMPLATE_COMMAND,
        node: HostMemoryNode | None = None,
        begun: BegunHelper | None = None,
    ) -> None:
        self._command, self._node, self._begun = tuple(command), node, begun
        self._lock = asyncio.Lock()
        self._template: _Template | None = None

    async def launch(self, connection: socket.socket, log: int) -> ChildProcess:
        async with self._lock:
            if self._template is None or self._template.is_lost:
                await self._drop()
                begun, self._begun = self._begun or BegunHelper(self._command), None
                self._template = await _Template.start(begun)
            tier = None if self._node is None else await self._node.connect()
            try:
                return await self._template.fork([connection.fileno(), log, *([] if tier is None else [tier.fileno()])])
            finally:
                if tier is not None:
                    tier.close()

    async def close(self) -> None:
        """End the template."""
        async with self._lock:
            await self._drop()

    async def _drop(self) -> None:
        template, self._template = self._template, None
        if template is not None:
            await template.close()


class _Template:
    """One template process and the engines forked off it. Made by `start`."""

    def __init__(self) -> None:
        self._helper: Helper | None = None
        self._answers: asyncio.Queue[tuple[Ready | Forked, list[int]] | None] = asyncio.Queue()
        self._engines: dict[int, _ForkedEngine] = {}
        self.is_lost = False

    @classmethod
    async def start(cls, begun: BegunHelper) -> _Template:
        template = cls()
        template._helper = Helper(begun, MAX_MESSAGE_BYTES, template._heed, template._note_loss)
        try:
            await template._answer(_START_S)
        except BaseException:
            await template.close()
            raise
        return template

    async def fork(self, descriptors: Sequence[int]) -> ChildProcess:
        assert self._helper is not None
        self._helper.send(b"fork", descriptors)
        answer, received = await self._answer(_FORK_S)
        if not isinstance(answer, Forked):
            raise LaunchFailed(f"the engines' template answered {type(answer).__name__} instead of Forked")
        engine = self._engines[answer.pid] = _ForkedEngine(answer.pid, received[0])
        return engine

    async def close(self) -> None:
        """End the process. Engines that run are watched without it from now on."""
        if self._helper is not None:
            await self._helper.close()

    async def _answer(self, limit_s: float) -> tuple[Ready | Forked, list[int]]:
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._answers.get()
        except TimeoutError:
            self.is_lost = True
            raise LaunchFailed(f"the engines' template did not answer within {limit_s:g} s") from None
        if answer is None:
            raise LaunchFailed("the engines' template has died")
        return answer

    def _heed(self, message: bytes, descriptors: list[int]) -> None:
        match msgspec.msgpack.decode(message, type=Answer):
            case Ended(pid, status):
                if (engine := self._engines.pop(pid, None)) is not None:
                    engine.note_end(status)
            case answer:
                self._answers.put_nowait((answer, descriptors))

    def _note_loss(self) -> None:
        self.is_lost = True
        self._answers.put_nowait(None)
        for engine in self._engines.values():
            engine.watch()


class _ForkedEngine:
    """An engine whose parent is the template. Owns the pidfd."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd
        self.returncode: int | None = None
        self._ended = asyncio.Event()

    async def wait(self) -> object:
        return await self._ended.wait()

    def kill(self) -> None:
        if self._ended.is_set():
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def note_end(self, status: int | None) -> None:
        self.returncode = status
        self._ended.set()
        os.close(self._pidfd)

    def watch(self) -> None:
        """Notice the end without being told, and so without a status."""
        asyncio.get_running_loop().add_reader(self._pidfd, self._note_silent_end)

    def _note_silent_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self.note_end(None)
