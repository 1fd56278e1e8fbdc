"""Matching of regular expressions that come with an adapter, with an end to how long it may take.

PEFT reads many fields of adapter_config.json as Python regular expressions. Python's matcher backtracks, cannot be
interrupted and keeps every other thread waiting, so one adapter could hang a server for good. Patterns made of nothing
but names and dots have no choices to backtrack over and are matched here; all others, such as
`.*layers\\.[02]\\..*`, are matched in a short-lived child process with a limit on its CPU time and memory. The meaning
is exactly that of Python's `re`, lookaheads included.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rekindle.errors import AdapterRejected

MAX_CPU_S = 1
"""CPU time for all patterns of one adapter; real ones take milliseconds."""

MAX_PATTERNS = 2048
"""Of one adapter. One for the rank and one for alpha of every matrix of a model with 126 layers make 1,764."""

MAX_PATTERN_CHARS = 1 << 18
"""Of all patterns of one adapter; those of full names in such a model have 100,000."""

_MAX_WALL_S = 60.0
_MAX_MEMORY_BYTES = 1 << 30
_WITHOUT_CHOICES = re.compile(r"\^?(?:[\w.\-]|\\[.\-])*\$?")
"""Each part takes a letter of the name, so that no length of such a pattern makes a match slow."""

_CHILD = """
import json, re, resource, sys
job = json.load(sys.stdin)
for limit, value in ((resource.RLIMIT_CPU, job["cpu_s"]), (resource.RLIMIT_AS, job["memory_bytes"])):
    resource.setrlimit(limit, (value, value))
found = []
for index, (expression, is_full, group) in enumerate(job["patterns"]):
    try:
        matcher = re.compile(expression)
        match_one = matcher.fullmatch if is_full else matcher.match
        matches = [match_one(name) for name in job["names"]]
        found.append([match and match[group] for match in matches])
    except (re.error, IndexError, OverflowError, MemoryError, RecursionError) as error:
        json.dump({"index": index, "error": f"{type(error).__name__}: {error}"}, sys.stdout)
        break
else:
    json.dump({"found": found}, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression built from `text`, which the configuration holds in `field`.

    `expression` is applied with `re.fullmatch` or `re.match`; `group` is the part of a match that counts.
    """

    field: str
    text: str
    expression: str
    is_full: bool = False
    group: str | int = 0


def match_all(patterns: Sequence[Pattern], names: Sequence[str]) -> list[list[str | None]]:
    """For each pattern, for each name: what its group matched, or None where the pattern does not match.

    Raises:
        AdapterRejected: a pattern is not a valid regular expression, they are too many, or take too long.
    """
    num_chars = sum(len(pattern.text) for pattern in patterns)
    if len(patterns) > MAX_PATTERNS or num_chars > MAX_PATTERN_CHARS:
        fields = ", ".join(sorted({pattern.field for pattern in patterns}))
        raise AdapterRejected(
            f"adapter_config.json holds {len(patterns)} patterns of module names with {num_chars} characters "
            f"({fields}); at most {MAX_PATTERNS} with {MAX_PATTERN_CHARS} are matched: let one pattern stand for "
            "several modules"
        )
    if all(_WITHOUT_CHOICES.fullmatch(pattern.text) for pattern in patterns):
        return [_match_here(pattern, names) for pattern in patterns]
    return _match_in_child(patterns, names)


def _match_here(pattern: Pattern, names: Sequence[str]) -> list[str | None]:
    try:
        matcher = re.compile(pattern.expression)
    except re.error as error:
        raise _invalid(pattern, str(error)) from error
    match_one = matcher.fullmatch if pattern.is_full else matcher.match
    return [match[pattern.group] if (match := match_one(name)) else None for name in names]


def _match_in_child(patterns: Sequence[Pattern], names: Sequence[str]) -> list[list[str | None]]:
    job = {
        "cpu_s": MAX_CPU_S,
        "memory_bytes": _MAX_MEMORY_BYTES,
        "names": list(names),
        "patterns": [(pattern.expression, pattern.is_full, pattern.group) for pattern in patterns],
    }
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    try:
        child = subprocess.run(
            command, input=json.dumps(job).encode(), capture_output=True, timeout=_MAX_WALL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _too_slow(patterns) from error
    if child.returncode != 0:
        raise _too_slow(patterns)
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise _invalid(patterns[answer["index"]], answer["error"])
    found: list[list[str | None]] = answer["found"]
    return found


def _invalid(pattern: Pattern, reason: str) -> AdapterRejected:
    return AdapterRejected(f"{pattern.field}: {pattern.text[:200]!r} is not a usable regular expression: {reason}")


def _too_slow(patterns: Sequence[Pattern]) -> AdapterRejected:
    shown = ", ".join(sorted({f"{pattern.field} {pattern.text[:80]!r}" for pattern in patterns})[:4])
    return AdapterRejected(
        f"the regular expressions of adapter_config.json take more than {MAX_CPU_S} s of CPU time to match ({shown}); "
        "write the module names out, or remove nested repetitions"
    )
