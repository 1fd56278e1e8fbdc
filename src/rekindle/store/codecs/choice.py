"""When packing pays, and with which codec: arithmetic on measured figures, with its reasons.

Bringing back n bytes over a link takes n / link. Packed to a share r of that and unpacked at rate d while they arrive,
they take max(r n / link, n / d), which is less if and only if d exceeds the link's rate (after Sabre, OSDI'24, whose
figure 9 shows software DEFLATE losing to a raw disk). Packed bytes that stay in memory cross no link: they stand in for
dropping the object and loading it again over the link, and take n / d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rekindle.store.codecs.measure import Measured
from rekindle.units import format_bytes

MIN_SAVING = 0.05
"""Of an object's bytes; below that, packing is not worth its bookkeeping."""

_AS_GOOD = 1.01
"""A codec within that factor of the best is as good, and the one of them that unpacks fastest is taken."""


class Purpose(Enum):
    """What packed bytes are for."""

    TRANSFER = "transfer"
    """They cross the link packed and are unpacked on this side."""

    MEMORY = "memory"
    """They stay in memory in place of the object; unpacked, nothing crosses the link."""


@dataclass(frozen=True, slots=True)
class Choice:
    """`codec` is None where the object is better left as it is. `ready_s` is how long bringing it back takes then, and
    `kept_bytes` what is kept of it. `reasons` has a line for each codec and one for the outcome."""

    codec: str | None
    ready_s: float
    kept_bytes: int
    reasons: tuple[str, ...]


def choose_codec(
    num_bytes: int,
    measured: Sequence[Measured],
    link_bytes_s: float,
    purpose: Purpose,
    max_pack_s: float | None = None,
) -> Choice:
    """Choose for an object of `num_bytes` (positive), of which `measured` were taken on a sample.

    For transfer that is the codec that has it ready first; for memory the one that keeps fewest bytes, among those that
    have it ready before the link would. A codec that takes longer than `max_pack_s` to pack the object is not used.
    """
    plain_s = num_bytes / link_bytes_s
    reasons, candidates = [], []
    for figures in measured:
        kept_bytes, ready_s = _outcome(num_bytes, figures, link_bytes_s, purpose)
        refusal = _refusal(num_bytes, figures, link_bytes_s, max_pack_s)
        reasons.append(
            f"{figures.codec}: {format_bytes(kept_bytes)} ({figures.share:.3f}), "
            f"unpacks {_rate(figures.unpack_bytes_s)}, ready in {_ms(ready_s)} against {_ms(plain_s)} as it is"
            + (f"; not used: {refusal}" if refusal else "")
        )
        if not refusal:
            cost = ready_s if purpose is Purpose.TRANSFER else kept_bytes
            candidates.append((cost, figures, kept_bytes, ready_s))
    if not candidates:
        reasons.append(f"left as it is: no codec pays for {purpose.value}")
        return Choice(None, plain_s, num_bytes, tuple(reasons))
    least = min(cost for cost, *_ in candidates)
    _, figures, kept_bytes, ready_s = max(
        (candidate for candidate in candidates if candidate[0] <= _AS_GOOD * least),
        key=lambda candidate: candidate[1].unpack_bytes_s,
    )
    kept = f"keeps {format_bytes(kept_bytes)} of {format_bytes(num_bytes)}"
    reasons.append(f"{figures.codec} for {purpose.value}: {kept}")
    return Choice(figures.codec, ready_s, kept_bytes, tuple(reasons))


def _outcome(num_bytes: int, figures: Measured, link_bytes_s: float, purpose: Purpose) -> tuple[int, float]:
    """Bytes kept, and seconds until the object is ready."""
    kept = figures.share * num_bytes
    unpack_s = num_bytes / figures.unpack_bytes_s
    return round(kept), max(kept / link_bytes_s, unpack_s) if purpose is Purpose.TRANSFER else unpack_s


def _refusal(num_bytes: int, figures: Measured, link_bytes_s: float, max_pack_s: float | None) -> str:
    if figures.share > 1 - MIN_SAVING:
        return f"it saves less than {MIN_SAVING:.0%}"
    if figures.unpack_bytes_s <= link_bytes_s:
        return f"it unpacks no faster than the link's {_rate(link_bytes_s)}"
    pack_s = num_bytes / figures.pack_bytes_s
    if max_pack_s is not None and pack_s > max_pack_s:
        return f"packing takes {_ms(pack_s)}, at most {_ms(max_pack_s)} are allowed"
    return ""


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / 1e9:.2f} GB/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
