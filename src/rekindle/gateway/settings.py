"""Limits of the gateway, each with its unit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rekindle.units import MIB


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What one gateway accepts.

    `adapter_roots` are the directories under which adapters may be registered over HTTP; with none, registration is
    refused. `max_body_bytes` bounds a request's body, `max_choices` its `n`, `max_sequences` the sequences it becomes
    (prompts times choices). `send_timeout_s` is how long a client may leave a stream unread before it is given up,
    `comment_every_s` how often a stream that has no token yet says that it is there. `retry_after_s` is what a draining
    or starting server advises.
    """

    adapter_roots: tuple[Path, ...] = ()
    max_body_bytes: int = 16 * MIB
    max_choices: int = 128
    max_sequences: int = 1024
    send_timeout_s: float = 120.0
    comment_every_s: float = 10.0
    retry_after_s: float = 1.0
