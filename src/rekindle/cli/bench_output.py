"""What the measurements of `rekindle bench` share at the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from rekindle.errors import ConfigurationError


def check_writable(path: Path) -> None:
    """Minutes of measuring shall not end at a file that cannot be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written: {error.strerror}") from error


def say(what: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
