"""Stop strings: where a text ends, found while it streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Matched:
    """What a push released: `text` is safe to send; `stopped` says that a stop string ended the text there."""

    text: str
    stopped: bool


class StopStrings:
    """Finds the first stop string to be completed, over any split of the text into pieces.

    Text that may be the beginning of a stop string is held back until the next characters decide. When two stop
    strings end at the same character, the longer one counts. With `include` the stop string stays in the text.
    Each stop string is followed by the automaton of Knuth, Morris and Pratt, so a character costs amortised constant
    time per stop string, whatever its length.
    """

    __slots__ = ("_first_chars", "_held", "_include", "_matchers")

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._include: Final = include
        self._matchers = [_Matcher(stop) for stop in stops]
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._held = ""

    def push(self, text: str) -> Matched:
        """Take the next piece of text. Nothing may be pushed after a stop."""
        if not self._held and self._first_chars.isdisjoint(text):
            return Matched(text, stopped=False)
        buffer = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            longest = max((len(m.stop) for m in self._matchers if m.advance(char)), default=0)
            if longest:
                self._held = ""
                return Matched(buffer[: end if self._include else end - longest], stopped=True)
        safe = len(buffer) - max(matcher.matched for matcher in self._matchers)
        self._held = buffer[safe:]
        return Matched(buffer[:safe], stopped=False)

    def flush(self) -> str:
        """What was held back when the text ended without a stop."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """One stop string and the length of its longest prefix that ends the text so far."""

    __slots__ = ("_border", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._border = _borders(stop)

    def advance(self, char: str) -> bool:
        """Take one character; True when it completes the stop string."""
        while self.matched and self.stop[self.matched] != char:
            self.matched = self._border[self.matched - 1]
        if self.stop[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.stop)


def _borders(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(stop)
    length = 0
    for place in range(1, len(stop)):
        while length and stop[place] != stop[length]:
            length = borders[length - 1]
        if stop[place] == stop[length]:
            length += 1
        borders[place] = length
    return borders
