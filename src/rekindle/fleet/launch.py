"""How an engine's process comes to be: by running a command, or as a fork of a template that has everything imported.

Either way it is the leader of a session of its own, so that signals meant for this process's group do not reach it, its
connection is the given socket, and what it writes to its standard error goes to the given descriptor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Protocol, TypeVar

import msgspec

from rekindle.fleet.control import Answers, BegunHelper, ChildProcess, Helper, LaunchFailed, run_command
from rekindle.fleet.host_memory import HostMemoryNode
from rekindle.protocol.template import MAX_MESSAGE_BYTES, Answer, Ended, Forked, Ready

T = TypeVar("T")
_logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "rekindle.engine")
TEMPLATE_COMMAND = (sys.executable, "-m", "rekindle.engine.template")

_NAME = "the engines' template"
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
    and again should it die. With a `node`, engines share memory through it, if it can be had.

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
            with ExitStack() as lent:
                tier = [] if (found := await self._tier()) is None else [lent.enter_context(found).fileno()]
                return await self._template.fork([connection.fileno(), log, *tier])

    async def close(self) -> None:
        """End the template."""
        async with self._lock:
            await self._drop()

    async def _tier(self) -> socket.socket | None:
        try:
            return None if self._node is None else await self._node.connect()
        except LaunchFailed as error:
            _logger.error("an engine starts without host memory: %s", error)
            return None

    async def _drop(self) -> None:
        template, self._template = self._template, None
        if template is not None:
            await template.close()


class _Template:
    """One template process and the engines forked off it. Made by `start`."""

    def __init__(self, begun: BegunHelper) -> None:
        self._readiness: Answers[Ready] = Answers(_NAME)
        self._forks: Answers[_ForkedEngine] = Answers(_NAME)
        self._engines: dict[int, _ForkedEngine] = {}
        self._helper = Helper(begun, MAX_MESSAGE_BYTES, self._heed, self._note_loss)

    @property
    def is_lost(self) -> bool:
        """Whether nothing more can be asked of it."""
        return self._helper.is_lost

    @classmethod
    async def start(cls, begun: BegunHelper) -> _Template:
        template = cls(begun)
        try:
            await template._next(template._readiness, _START_S)
        except BaseException:
            await template.close()
            raise
        return template

    async def fork(self, descriptors: Sequence[int]) -> ChildProcess:
        """Start an engine; one that nobody waits for any more is killed."""
        self._helper.send(b"fork", descriptors)
        return await self._next(self._forks, _FORK_S)

    async def close(self) -> None:
        """End the process. Engines that run are watched without it from now on."""
        await self._helper.close()

    async def _next(self, answers: Answers[T], limit_s: float) -> T:
        try:
            return await answers.next(limit_s)
        except LaunchFailed:
            self._helper.give_up()
            raise

    def _heed(self, message: bytes, descriptors: list[int]) -> None:
        try:
            match msgspec.msgpack.decode(message, type=Answer):
                case Ready() as ready:
                    self._readiness.give(ready)
                case Forked(pid) if descriptors:
                    engine = self._engines[pid] = _ForkedEngine(pid, descriptors.pop())
                    if not self._forks.give(engine):
                        with suppress(ProcessLookupError):
                            engine.kill()
                case Ended(pid, status) if pid in self._engines:
                    self._engines.pop(pid).note_end(status)
                case answer:
                    raise msgspec.ValidationError(f"{answer} is out of turn")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _note_loss(self) -> None:
        self._readiness.fail()
        self._forks.fail()
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
        self.note_end(self._reap())

    def _reap(self) -> int | None:
        """Without their template, engines are children of the first process of their container, which may be this."""
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            return None
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
