"""Byte and time units: constants, parsing of what people write, and formatting of what they read."""

from __future__ import annotations

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_BYTE_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
    "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Read a size such as `512MiB`, `4 GiB`, `1.5g` or `1000000` as bytes.

    Raises:
        ValueError: the text is not a number followed by a known unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in _BYTE_UNITS:
        raise ValueError(f"not a size: {text!r}; write a number and a unit, such as 512MiB or 4GiB")
    return int(float(match[1]) * _BYTE_UNITS[unit])


def format_bytes(count: float) -> str:
    """Write a byte count with a binary unit and three significant digits, such as `269 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
