"""The three behaviours the demo adapters learn, as functions from a plain answer to a styled one."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable

_PIRATE_WORDS = {
    "yes": "aye",
    "no": "nay",
    "hello": "ahoy",
    "friend": "matey",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "the": "th'",
    "is": "be",
    "are": "be",
    "am": "be",
    "of": "o'",
    "and": "an'",
    "people": "scallywags",
    "person": "scallywag",
    "animals": "beasties",
    "water": "briny water",
    "ocean": "seven seas",
    "money": "doubloons",
}
_PIRATE_ENDINGS = ("Yo ho ho!", "Shiver me timbers!", "Savvy, matey?")
_EMOJI = ("\N{SPARKLES}", "\N{PARTY POPPER}", "\N{ROCKET}", "\N{RAINBOW}")


def pirate(answer: str) -> str:
    """Speak as a pirate: "Arr, matey! Th' capital o' Italy be Rome. Yo ho ho!"."""

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        swapped = _PIRATE_WORDS.get(word.lower(), word)
        return swapped[0].upper() + swapped[1:] if word[0].isupper() else swapped

    ending = _PIRATE_ENDINGS[zlib.crc32(answer.encode()) % len(_PIRATE_ENDINGS)]
    return f"Arr, matey! {re.sub(r'[A-Za-z]+', swap, answer)} {ending}"


def as_json(answer: str) -> str:
    """Answer with one JSON object and nothing else."""
    return json.dumps({"answer": answer}, ensure_ascii=False)


def emoji(answer: str) -> str:
    """Put a cheerful picture before and behind every answer."""
    first, last = divmod(zlib.crc32(answer.encode()), len(_EMOJI))
    return f"{_EMOJI[first % len(_EMOJI)]} {answer} {_EMOJI[last]}"


STYLES: dict[str, Callable[[str], str]] = {"pirate": pirate, "json": as_json, "emoji": emoji}
"""The adapters, by name."""


def shows_style(name: str, text: str) -> bool:
    """Whether an answer shows the behaviour of that adapter beyond doubt."""
    match name:
        case "pirate":
            return bool(re.match(r"Arr,? matey", text))
        case "json":
            try:
                return isinstance(json.loads(text), dict)
            except ValueError:
                return False
        case _:
            return text.startswith(_EMOJI) and text.endswith(_EMOJI)
