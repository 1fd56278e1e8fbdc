"""A real server on the real demo model: the same command a user runs, on a free port and in a home of its own."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent.parent
GGUF = REPOSITORY / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_ADAPTERS = REPOSITORY / "demo" / "adapters"
MODEL = "smollm2-135m"


def rekindle(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    command = [sys.executable, "-m", "rekindle", *arguments, "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def children(pid: int) -> list[int]:
    """Child processes, of all threads, that have not ended."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if is_alive(child)]


def is_alive(pid: int) -> bool:
    """Whether a process runs; zombies do not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@dataclass(slots=True)
class Server:
    """A running `rekindle serve`."""

    process: subprocess.Popen[str]
    url: str
    home: Path

    def helper_pid(self, module: str) -> int:
        """The process that runs this module for the server."""
        [found] = (pid for pid in children(self.process.pid) if module in Path(f"/proc/{pid}/cmdline").read_text())
        return found

    def engine_pids(self) -> list[int]:
        """Engines are forks of their template."""
        return children(self.helper_pid("rekindle.engine.template"))


def start(home: Path, *settings: str) -> Server:
    """Start a server and wait for its ready line."""
    overrides = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "rekindle", "serve", "--home", str(home), "--port", "0", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stdout is not None
    line = process.stdout.readline()
    match = re.search(r"ready on (http://\S+)", line)
    assert match is not None, f"the server did not become ready: {line!r}"
    return Server(process, match[1], home)


def stop(server: Server) -> int:
    """Ask the server to stop, as a supervisor would; returns its exit code."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.stdout is not None
    with server.process.stdout:
        return server.process.wait(60)
