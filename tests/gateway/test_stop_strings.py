"""Stop strings: the same end of the text, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.gateway.stop_strings import StopStrings

TEXT = st.text("abc", max_size=40)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


def specified(text: str, stops: list[str], *, include: bool) -> tuple[str, bool]:
    """The first end of any stop string; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if include else end - max(ending)], True
    return text, False


def spell(pieces: list[str], stops: list[str], *, include: bool) -> tuple[str, bool]:
    matcher = StopStrings(stops, include=include)
    shown = ""
    for piece in pieces:
        matched = matcher.push(piece)
        shown += matched.text
        if matched.stopped:
            return shown, True
    return shown + matcher.flush(), False


@given(TEXT, STOPS, st.booleans(), st.data())
def test_any_split_of_a_text_ends_where_the_definition_says(text, stops, include, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert spell(pieces, stops, include=include) == specified(text, stops, include=include)


@given(TEXT, STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text, stops):
    matcher = StopStrings(stops, include=False)
    shown = ""
    for char in text:
        matched = matcher.push(char)
        shown += matched.text
        if matched.stopped:
            return
        held = matcher.flush()
        matcher._held = held
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_without_a_hint_of_a_stop_string_passes_at_once():
    matcher = StopStrings(["END"], include=False)
    assert matcher.push("hello").text == "hello"
    assert matcher.push(" E").text == " "
    assert matcher.push("very").text == "Every"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""], include=False)
