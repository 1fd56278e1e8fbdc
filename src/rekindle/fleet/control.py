"""A helper process and the socket it answers on: messages with boundaries, which may bring descriptors."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import msgspec

from rekindle.engine.environment import ENVIRONMENT
from rekindle.errors import InternalError

T = TypeVar("T")
_logger = logging.getLogger(__name__)


class LaunchFailed(InternalError):
    """A process did not come to be, or does not answer."""


class ChildProcess(Protocol):
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


class BegunHelper:
    """A helper process, `command --fd N` where N is its end of a socket, begun before there need be an event loop.

    As a context it sees to it that none is left behind, whoever has talked to it meanwhile.

    Raises:
        LaunchFailed: it cannot be run.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        with theirs:
            try:
                self.process = subprocess.Popen(
                    (*command, "--fd", str(theirs.fileno())),
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                    env={**ENVIRONMENT, **os.environ},
                )
            except OSError as error:
                self.control.close()
                raise LaunchFailed(f"{command[0]} could not be started: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()


class Helper:
    """A helper process at work; `close` must be awaited in the end. All methods belong to one event loop.

    Every message it sends is given to `heed`, which owns the descriptors and raises MsgspecError at nonsense. `lost` is
    called once, when it has died, talks nonsense or is closed.
    """

    def __init__(
        self,
        begun: BegunHelper,
        max_message_bytes: int,
        heed: Callable[[bytes, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        self._process, self._control, self._max_message_bytes = begun.process, begun.control, max_message_bytes
        self._heed, self._lost = heed, lost
        self.is_lost = False
        asyncio.get_running_loop().add_reader(self._control, self._read)

    def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Say something; descriptors are copied.

        Raises:
            LaunchFailed: the process cannot be reached.
        """
        try:
            socket.send_fds(self._control, [message], descriptors)
        except OSError as error:
            raise LaunchFailed(f"helper process {self._process.pid} cannot be reached: {error}") from error

    async def close(self) -> None:
        """End the process."""
        self.give_up()
        self._process.kill()
        await asyncio.to_thread(self._process.wait)

    def give_up(self) -> None:
        """Take the process for lost."""
        if not self.is_lost:
            self.is_lost = True
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self._lost()

    def _read(self) -> None:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, self._max_message_bytes, 1)
        except BlockingIOError:
            return
        except OSError:
            message, descriptors = b"", []
        if not message:
            self.give_up()
            return
        try:
            self._heed(message, descriptors)
        except msgspec.MsgspecError as error:
            _logger.error("helper process %d is given up, as it talks nonsense: %s", self._process.pid, error)
            self.give_up()


class Answers(Generic[T]):
    """What a helper is asked for: answers come in the order of the questions, and who has asked may go away meanwhile.
    Errors call the helper `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._awaited: deque[asyncio.Future[T]] = deque()

    async def next(self, limit_s: float) -> T:
        """The answer to the question just asked.

        Raises:
            LaunchFailed: the helper died, or did not answer in time.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._awaited.append(answer)
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except TimeoutError:
            raise LaunchFailed(f"{self._name} did not answer within {limit_s:g} s") from None

    def give(self, answer: T) -> bool:
        """Pass on what was asked for; False if who did is gone.

        Raises:
            ValidationError: nobody has asked for it.
        """
        if not self._awaited:
            raise msgspec.ValidationError(f"nobody has asked for {answer!r}")
        awaited = self._awaited.popleft()
        if awaited.done():
            return False
        awaited.set_result(answer)
        return True

    def fail(self) -> None:
        """There will be no more answers."""
        while self._awaited:
            awaited = self._awaited.popleft()
            if not awaited.done():
                awaited.set_exception(LaunchFailed(f"{self._name} has died"))


async def run_command(command: Sequence[str], descriptors: Sequence[int], log: int) -> ChildProcess:
    """Run a command in a session of its own, with these descriptors, and its standard error going to `log`.

    Raises:
        LaunchFailed: it cannot be run.
    """
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            pass_fds=descriptors,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            env={**ENVIRONMENT, **os.environ},
        )
    except OSError as error:
        raise LaunchFailed(f"{command[0]} could not be started: {error}") from error
