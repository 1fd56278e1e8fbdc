"""What is known of how long bringing an object takes."""

from __future__ import annotations

from dataclasses import dataclass

DISK_TO_DEVICE = "disk->device"
START = "start:"
"""Begins the stages that are parts of an engine's start."""


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """Bringing n bytes through `stage` takes fixed_s + n / bytes_per_s.

    `bytes_per_s` is None where nothing with bytes in it was brought yet.
    `error` is by how much, relative to what was then measured, the latest predictions were wrong: their median, None
    before there was one. `num_observations` were made in all.
    """

    stage: str
    fixed_s: float
    bytes_per_s: float | None
    num_observations: int
    error: float | None
