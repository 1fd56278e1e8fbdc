"""What `models rm` and `adapters rm` say when they are done."""

from __future__ import annotations

from pathlib import Path


def print_removal(name: str, files: Path) -> None:
    """Say that `name` is gone, and where its files are not, why."""
    kept = "; its files stay while another name has them or a process serves from this home" if files.exists() else ""
    print(f"removed {name}{kept}")
