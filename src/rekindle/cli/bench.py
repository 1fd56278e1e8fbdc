"""`rekindle bench`: measure on this machine. Each kind of measurement is a module of its own."""

from __future__ import annotations

import argparse
import os

from rekindle.engine.environment import ENVIRONMENT


def lora(arguments: argparse.Namespace) -> int:
    """Measure what adapters cost an engine in this process."""
    os.environ.update({**ENVIRONMENT, **os.environ})
    # Not at the top: it loads PyTorch, whose threads read the environment once, and this is to be an engine's.
    from rekindle.cli.bench_lora import measure

    return measure(arguments)


def coldstart(arguments: argparse.Namespace) -> int:
    """Measure how long a model without an engine takes to its first token."""
    from rekindle.cli.bench_coldstart import measure  # loads PyTorch

    return measure(arguments)


def codecs(arguments: argparse.Namespace) -> int:
    """Measure the codecs of packed weights."""
    from rekindle.cli.bench_codecs import measure  # loads numpy, which no other command line needs

    return measure(arguments)


def load(arguments: argparse.Namespace) -> int:
    """Measure how fast weights come from the disk into memory."""
    os.environ.update({**ENVIRONMENT, **os.environ})
    from rekindle.cli.bench_load import measure  # as above

    return measure(arguments)
