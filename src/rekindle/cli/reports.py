"""What measurements share: progress on a terminal, and a file for all figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from rekindle.errors import ConfigurationError


def check_writable(path: Path) -> None:
    """Minutes of measuring shall not end at a file that cannot be written.

    Raises:
        ConfigurationError: it cannot be.
    """
    try:
        path.open("a").close()
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written: {error.strerror}") from error


def write_report(path: Path, report: Any) -> None:
    """Write a record of figures as JSON."""
    path.write_text(json.dumps(msgspec.to_builtins(report), indent=1) + "\n")
    print(f"written: {path}")


def say(what: str) -> None:
    """Progress, on a terminal only; the next call replaces it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
