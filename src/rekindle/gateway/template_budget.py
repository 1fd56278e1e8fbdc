"""What one render of a foreign template may spend, and the price of what it does.

Prices are paid before the work is done, since a single call (a power, a repeated text, the comparison of lists that
hold each other many times) can otherwise take for ever without letting go of the interpreter lock.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterator, KeysView, ValuesView

import jinja2

MAX_STEPS = 2_000_000
"""Steps of one render: operations, elements looked at, and thousands of characters. A few seconds of work."""
MAX_BUILT_CHARS = 64 << 20
"""Characters of all texts and lists that one render builds, intermediate ones included."""
MAX_DEPTH = 100
"""How deep values may be nested."""
MAX_NUMBER_BITS = 4096
MAX_PADDING = 999
"""Characters by which a format may widen one value."""

PIECE_CHARS = 64
"""What a short text of its own takes in memory, as characters."""
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

_CHARS_PER_STEP = 1024
_ELEMENT_CHARS = 8
"""What an element adds to its container: a reference in memory; quotes and a separator as text."""
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


class TemplateTooCostly(jinja2.TemplateError):
    """The template wants more work or memory than a prompt can need."""


class Budget:
    """What one render may still spend."""

    def __init__(self) -> None:
        self._steps_left = MAX_STEPS
        self._chars_left = MAX_BUILT_CHARS

    def spend(self, num_steps: int) -> None:
        self._steps_left -= num_steps
        if self._steps_left < 0:
            raise TemplateTooCostly(f"it takes more than {MAX_STEPS} steps; send fewer messages or mend the template")

    def read(self, num_chars: int) -> None:
        self.spend(1 + num_chars // _CHARS_PER_STEP)

    def build(self, num_chars: int) -> None:
        """Pay for a text or a container of that size."""
        self.read(num_chars)
        self._chars_left -= num_chars
        if self._chars_left < 0:
            raise _too_long()

    def look_at(self, value: object) -> int:
        """Pay for going through a value once, to its depths; returns how many characters its text has at most."""
        if isinstance(value, str):
            self.read(len(value))
            return len(value)
        num_chars = 0
        pending: list[Iterator[object]] = [iter((value,))]
        while pending:
            item = next(pending[-1], _END)
            if item is _END:
                pending.pop()
                continue
            self.read(len(item) if isinstance(item, str) else 0)
            num_chars += _own_chars(item)
            if num_chars > MAX_BUILT_CHARS:
                raise _too_long()
            if isinstance(item, _CONTAINERS):
                pending.append(_parts(item))
                if len(pending) > MAX_DEPTH:
                    raise TemplateTooCostly(f"it nests values more than {MAX_DEPTH} deep")
            elif isinstance(item, range):
                self.spend(len(item))
        return num_chars


_END = object()


def size_of(value: object) -> int:
    """The size of a text or a container as `Budget.build` counts it, without what its elements hold."""
    if isinstance(value, str):
        return len(value)
    return _ELEMENT_CHARS * len(value) if isinstance(value, _CONTAINERS) else 0


def check_number(value: object) -> None:
    """Refuse integers so large that arithmetic with them takes long."""
    if isinstance(value, int) and value.bit_length() > MAX_NUMBER_BITS:
        raise TemplateTooCostly(
            f"it computes with a number of {value.bit_length()} bits; the limit is {MAX_NUMBER_BITS}"
        )


def check_power(base: object, exponent: object) -> None:
    """Refuse a power that would have too many bits."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_NUMBER_BITS:
        raise TemplateTooCostly(f"it computes a power of more than {MAX_NUMBER_BITS} bits")


def check_padding(form: str) -> None:
    """Refuse a format that widens a value beyond the limit, or by what another value says."""
    if "*" in form or any(int(digits[:8]) > MAX_PADDING for digits in re.findall(r"\d+", form)):
        raise TemplateTooCostly(f"it formats a value to more than {MAX_PADDING} characters")


def replaced_chars(text: str, old: str, new: str) -> int:
    """The length of `text.replace(old, new)` at most."""
    num_found = text.count(old) if old else len(text) + 1
    return len(text) + num_found * len(new)


def _too_long() -> TemplateTooCostly:
    return TemplateTooCostly(
        f"it works on more than {MAX_BUILT_CHARS} characters; send shorter messages or mend the template"
    )


def split_chars(text: str, separator: object = None) -> int:
    """What the pieces of `text.split(separator)` take at most."""
    num_found = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    return PIECE_CHARS * (1 + num_found)


def num_lines(text: str) -> int:
    """The lines of `text.splitlines()` at most."""
    return 1 + sum(map(text.count, LINE_ENDS))


def _own_chars(value: object) -> int:
    if isinstance(value, str):
        return len(value) * _escaped_chars(value) + _ELEMENT_CHARS
    if isinstance(value, int):
        check_number(value)
        return value.bit_length() // 3 + _ELEMENT_CHARS
    return 4 * _ELEMENT_CHARS


def _escaped_chars(text: str) -> int:
    """The characters that one of `text` becomes in the text of a container, at most."""
    if text.isprintable():
        return 1
    return 4 if text.isascii() else 10


def _parts(container: object) -> Iterator[object]:
    if isinstance(container, dict):
        return (part for item in container.items() for part in item)
    return iter(container)  # type: ignore[call-overload,no-any-return]  # one of _CONTAINERS
