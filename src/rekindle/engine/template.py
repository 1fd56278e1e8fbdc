"""`python -m rekindle.engine.template --fd N`: a process in which everything an engine needs is imported, and of which
engines are forks: starting one takes milliseconds instead of the seconds that imports take.

It answers on the connected socket N, which keeps the boundaries of messages. Each message asks for an engine and brings
descriptors: its connection, its log and, if there is one, its connection to the host-memory tier. The answer is a
`Forked` with the engine's pidfd, and when that engine ends an `Ended` follows. The process ends with its peer; engines
go on.

A fork takes only the thread that forks with it. So this process never has another one: it runs no parallel operation
and touches no GPU.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import selectors
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

import msgspec

from rekindle.clock import SystemClock
from rekindle.engine.engine import Engine
from rekindle.engine.process import EngineFactory, serve, with_tier
from rekindle.errors import ConfigurationError
from rekindle.protocol.template import MAX_MESSAGE_BYTES, Answer, Ended, Forked, Ready
from rekindle.store.codecs.interface import Format
from rekindle.store.codecs.registry import codec_for

_logger = logging.getLogger(__name__)


class Template:
    """Forks on demand; `run` returns in this process only."""

    def __init__(self, control: socket.socket, make_engine: EngineFactory) -> None:
        self._control, self._make_engine = control, make_engine
        self._selector = selectors.DefaultSelector()
        self._pids: dict[int, int] = {}  # by pidfd

    def run(self) -> None:
        """Serve until the peer is gone."""
        gc.collect()
        gc.freeze()  # a collection in a fork would write to, and so copy, every page that holds an object
        self._selector.register(self._control, selectors.EVENT_READ)
        self._tell(Ready())
        with suppress(ConfigurationError):  # it proves itself once, here, and not in every engine
            codec_for(Format.DEFLATE_PLANES)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._bury(key.fd)
                elif not self._answer():
                    return

    def _answer(self) -> bool:
        """Fork once; False if the peer is gone."""
        message, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 3)
        if not message:
            return False
        pid = os.fork()
        if pid == 0:
            self._become_engine(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        pidfd = os.pidfd_open(pid)
        self._pids[pidfd] = pid
        self._selector.register(pidfd, selectors.EVENT_READ)
        self._tell(Forked(pid), pidfd)
        return True

    def _bury(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        pid = self._pids.pop(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._tell(Ended(pid, os.waitstatus_to_exitcode(status)))

    def _become_engine(self, connection: int, log: int, tier: int | None = None) -> NoReturn:
        """Nothing may lead back into the template's loop, hence the broad handler."""
        code = 1
        try:
            self._selector.close()
            self._control.close()
            for pidfd in self._pids:
                os.close(pidfd)
            os.setsid()
            os.dup2(log, sys.stderr.fileno())
            os.close(log)
            code = serve(connection, with_tier(self._make_engine, tier), SystemClock())
        except Exception:
            _logger.critical("the engine failed", exc_info=True)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _tell(self, answer: Answer, *descriptors: int) -> None:
        socket.send_fds(self._control, [msgspec.msgpack.encode(answer)], descriptors)


def main(make_engine: EngineFactory = Engine) -> None:
    """Run as the module says."""
    parser = argparse.ArgumentParser(prog="rekindle.engine.template")
    parser.add_argument("--fd", type=int, required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=parser.parse_args().fd) as control:
        try:
            Template(control, make_engine).run()
        except ConnectionError:
            return


if __name__ == "__main__":
    main()
