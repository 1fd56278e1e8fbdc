"""`rekindle serve`: start what takes longest first."""

from __future__ import annotations

import argparse

from rekindle.fleet.control import BegunHelper
from rekindle.fleet.launch import TEMPLATE_COMMAND


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then drain and stop."""
    with BegunHelper(TEMPLATE_COMMAND) as template:
        # Not at the top: these imports take a second, in which the template does its own.
        from rekindle.cli.server import run_server

        return run_server(arguments, template)
