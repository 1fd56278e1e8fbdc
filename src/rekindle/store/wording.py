"""How lists of names appear in messages."""

from collections.abc import Sequence


def listed(names: Sequence[str], *, limit: int = 8) -> str:
    """The first `limit` names and how many more there are; "none" for an empty list."""
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
