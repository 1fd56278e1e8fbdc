"""The filters templates may use, and what each builds beyond the size of its argument.

A filter that is not listed does not exist: those of Jinja that pad, quote, link or draw lots are of no use to a prompt,
and each would need a price.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from rekindle.gateway.template_budget import (
    MAX_DEPTH,
    PIECE_CHARS,
    Budget,
    TemplateTooCostly,
    num_lines,
    replaced_chars,
)

FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "format", "groupby",
    "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "tojson", "trim",
    "truncate", "unique", "upper",
})  # fmt: skip
INSTANT = frozenset({"count", "d", "default", "first", "last", "length", "safe"})
"""Filters whose time does not depend on their argument."""
SHALLOW = frozenset({"items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"})
"""Filters that go through their argument but not into its elements."""
SPLITTING = frozenset({"groupby", "join", "list", "sort", "title", "unique"})
"""Filters that take a text apart into characters or words."""

MAX_INDENT = 64
MAX_JSON_INDENT = 8
MAX_ROUND_DIGITS = 32
MAX_SEPARATOR_CHARS = 16
MAX_ESCAPE_CHARS = 6
"""What a character becomes where it is written as an escape, for most characters at most."""


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML, which models were not trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def pay_for_filter(budget: Budget, name: str, value: Any, num_chars: int, args: tuple[Any, ...], named: Any) -> None:
    """Pay for what the filter `name` builds from `value`, whose text of up to `num_chars` characters is paid for."""
    price = _PRICES.get(name)
    if price is not None:
        budget.build(price(value, num_chars, *args, **named))


def _join(value: Any, num_chars: int, d: object = "", attribute: object = None) -> int:
    del attribute
    return num_chars + len(str(d)) * (len(value) if hasattr(value, "__len__") else 0)


def _replace(value: Any, num_chars: int, s: object, new: object, count: object = None) -> int:
    del count
    return num_chars + replaced_chars(str(value), str(s), str(new))


def _indent(value: Any, num_chars: int, width: int | str = 4, first: bool = False, blank: bool = False) -> int:
    del first, blank
    width_chars = len(width) if isinstance(width, str) else width
    _check("indent", width_chars, MAX_INDENT)
    return num_chars + num_lines(str(value)) * (width_chars + PIECE_CHARS)


def _escape(value: Any, num_chars: int) -> int:
    del value
    return num_chars * MAX_ESCAPE_CHARS


def _trim(value: Any, num_chars: int, chars: str | None = None) -> int:
    del value
    return num_chars * max(1, len(chars or ""))


def _sum(value: Any, num_chars: int, attribute: object = None, start: object = 0) -> int:
    del value, attribute
    if not isinstance(start, int | float):
        raise TemplateTooCostly("the filter sum adds numbers only")
    return num_chars


def _round(value: Any, num_chars: int, precision: int = 0, method: str = "common") -> int:
    del value, method
    _check("round", abs(precision), MAX_ROUND_DIGITS)
    return num_chars


def _tojson(value: Any, num_chars: int, *args: Any, **named: Any) -> int:
    del value
    options = _JsonOptions(*args, **named)
    return num_chars * (options.max_char_chars + options.indent * MAX_DEPTH // 8)


class _JsonOptions:
    """The options of `to_json` that make its result longer, checked."""

    def __init__(
        self, ensure_ascii: object = False, indent: Any = None, separators: Any = None, sort_keys: object = False
    ) -> None:
        del sort_keys
        self.max_char_chars = MAX_ESCAPE_CHARS if ensure_ascii else 2
        self.indent: int = len(indent) if isinstance(indent, str) else indent or 0
        _check("tojson", self.indent, MAX_JSON_INDENT)
        _check("tojson", sum(map(len, separators or ())), MAX_SEPARATOR_CHARS)


def _check(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise TemplateTooCostly(f"the filter {name} is asked for {value} characters of padding; the limit is {limit}")


_PRICES: Mapping[str, Callable[..., int]] = {
    "e": _escape, "escape": _escape, "indent": _indent, "join": _join, "replace": _replace, "round": _round,
    "sum": _sum, "tojson": _tojson, "trim": _trim,
}  # fmt: skip
