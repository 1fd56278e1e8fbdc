"""The `rekindle` command: the composition root, where the parts are joined."""

from rekindle.cli.main import main

__all__ = ["main"]
