"""How an engine's process comes to be: by running a command, or as a fork of a template that has everything imported.

Either way it is the leader of a session of its own, so that signals meant for this process's group do not reach it, its
connection is the given socket, and what it writes to its standard error goes to the given descriptor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Protocol

import msgspec

from rekindle.engine.environment import ENVIRONMENT
from rekindle.errors import InternalError
from rekindle.protocol.template import MAX_MESSAGE_BYTES, Answer, Ended, Forked, Ready

ENGINE_COMMAND = (sys.executable, "-m", "rekindle.engine")
TEMPLATE_COMMAND = (sys.executable, "-m", "rekindle.engine.template")

_STDERR = 2
_START_S, _FORK_S = 120.0, 30.0
"""How long a template may take to import everything, and to fork."""


class LaunchFailed(InternalError):
    """No engine process came to be."""


class EngineProcess(Protocol):
    """A running process."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None:
        """How it ended; negative, it is the number of the signal that killed it. None while it runs, or if nobody
        could tell."""
        ...

    async def wait(self) -> object:
        """Return when it has ended."""
        ...

    def kill(self) -> None:
        """End it by force. Raises ProcessLookupError if it has ended."""
        ...


class Launcher(Protocol):
    """Starts engines. What it returns has to be waited for in the end."""

    async def launch(self, connection: socket.socket, log: int) -> EngineProcess:
        """Start an engine; the caller keeps, and closes, its copies of the descriptors.

        Raises:
            LaunchFailed: it cannot be started.
        """
        ...


class CommandLauncher:
    """Runs `command --fd N`."""

    def __init__(self, command: Sequence[str] = ENGINE_COMMAND) -> None:
        self._command = tuple(command)

    async def launch(self, connection: socket.socket, log: int) -> EngineProcess:
        return await _run(self._command, connection, log)


class TemplateLauncher:
    """Forks engines off one template process, which is started when the first engine is, and again should it die.

    All methods belong to one event loop. `close` must be awaited in the end; engines live on.
    """

    def __init__(self, command: Sequence[str] = TEMPLATE_COMMAND) -> None:
        self._command = tuple(command)
        self._lock = asyncio.Lock()
        self._template: _Template | None = None

    async def launch(self, connection: socket.socket, log: int) -> EngineProcess:
        async with self._lock:
            if self._template is None or self._template.is_lost:
                await self._drop()
                self._template = await _Template.start(self._command)
            return await self._template.fork(connection, log)

    async def close(self) -> None:
        """End the template."""
        async with self._lock:
            await self._drop()

    async def _drop(self) -> None:
        template, self._template = self._template, None
        if template is not None:
            await template.close()


class _Template:
    """One template process and the engines forked off it."""

    def __init__(self, process: EngineProcess, control: socket.socket) -> None:
        self._process, self._control = process, control
        self._answers: asyncio.Queue[tuple[Ready | Forked, list[int]] | None] = asyncio.Queue()
        self._engines: dict[int, _ForkedEngine] = {}
        self.is_lost = False
        asyncio.get_running_loop().add_reader(control, self._read)

    @classmethod
    async def start(cls, command: Sequence[str]) -> _Template:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            try:
                process = await _run(command, theirs, _STDERR)
            except BaseException:
                ours.close()
                raise
        template = cls(process, ours)
        try:
            await template._answer(_START_S)
        except BaseException:
            await template.close()
            raise
        return template

    async def fork(self, connection: socket.socket, log: int) -> EngineProcess:
        try:
            socket.send_fds(self._control, [b"fork"], [connection.fileno(), log])
        except OSError as error:
            raise LaunchFailed(f"the engines' template cannot be reached: {error}") from error
        answer, descriptors = await self._answer(_FORK_S)
        if not isinstance(answer, Forked):
            raise LaunchFailed(f"the engines' template answered {type(answer).__name__} instead of Forked")
        engine = self._engines[answer.pid] = _ForkedEngine(answer.pid, descriptors[0])
        return engine

    async def close(self) -> None:
        """Let the process end. Engines that run are watched without it from now on."""
        self._lose()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _answer(self, limit_s: float) -> tuple[Ready | Forked, list[int]]:
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._answers.get()
        except TimeoutError:
            self._lose()
            raise LaunchFailed(f"the engines' template did not answer within {limit_s:g} s") from None
        if answer is None:
            self._answers.put_nowait(None)
            raise LaunchFailed("the engines' template has died")
        return answer

    def _read(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lose()
            return
        match msgspec.msgpack.decode(message, type=Answer):
            case Ended(pid, status):
                if (engine := self._engines.pop(pid, None)) is not None:
                    engine.note_end(status)
            case answer:
                self._answers.put_nowait((answer, descriptors))

    def _lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
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


async def _run(command: Sequence[str], connection: socket.socket, log: int) -> EngineProcess:
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            "--fd",
            str(connection.fileno()),
            pass_fds=(connection.fileno(),),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={**ENVIRONMENT, **os.environ},
        )
    except OSError as error:
        raise LaunchFailed(f"{command[0]} could not be started: {error}") from error
