"""Tokenizers built from GGUF metadata, against what the formats define."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rekindle.errors import ModelRejected
from rekindle.store.gguf_tokenizer import tokenizer_files

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"


def load(files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer.from_str(files["tokenizer.json"].decode())


# SentencePiece


def sentence_piece_metadata(**changes: Any) -> dict[str, Any]:
    """A vocabulary as llama.cpp's converter writes it: control tokens, bytes, pieces with falling scores, letters."""
    pieces = [f"{SPACE}t", "he", f"{SPACE}a", "er", f"{SPACE}the", "in", "re", "an", f"{SPACE * 2}", "th", "at", "hat"]
    letters = [SPACE, *"thearinx.,1é"]
    entries = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<user>", 0.0, USER_DEFINED)]
    entries += [(f"<0x{value:02X}>", 0.0, BYTE) for value in range(256)]
    entries += [(piece, float(-rank), NORMAL) for rank, piece in enumerate(pieces + letters)]
    tokens, scores, types = (list(column) for column in zip(*entries, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def sentence_piece_reference(metadata: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's own procedure: join the neighbours whose union scores best until none is a piece."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] != BYTE}
    symbols = list(text.replace(" ", SPACE))
    while True:
        joined = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not joined:
            break
        _, at = min(joined)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [4 + value for value in symbol.encode()]
    return found


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(" thearinx.,1é!日\n"), max_size=40), prefix=st.booleans())
def test_scores_give_the_same_tokens_as_sentence_piece(text: str, prefix: bool) -> None:
    metadata = sentence_piece_metadata(add_space_prefix=prefix)
    tokenizer = load(tokenizer_files(metadata))
    expected = sentence_piece_reference(metadata, (" " if prefix and text else "") + text)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert encoding.ids == expected
    assert tokenizer.decode(encoding.ids) == text


def test_special_tokens_are_found_in_text_and_bos_begins_it() -> None:
    files = tokenizer_files(sentence_piece_metadata(add_space_prefix=False))
    encoding = load(files).encode("at</s><user>an")
    assert encoding.tokens == ["<s>", "at", "</s>", "<user>", "an"]
    assert load(files).decode(encoding.ids) == "at<user>an"
    settings = json.loads(files["tokenizer_config.json"])
    assert (settings["bos_token"], settings["eos_token"], settings["unk_token"]) == ("<s>", "</s>", "<unk>")
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (True, False)


def test_bos_and_eos_are_added_as_the_file_says() -> None:
    quiet = load(tokenizer_files(sentence_piece_metadata(add_bos_token=False)))
    assert quiet.encode("he").tokens == [SPACE, "he"]
    both = load(tokenizer_files(sentence_piece_metadata(add_eos_token=True)))
    assert both.encode("he").tokens == ["<s>", SPACE, "he", "</s>"]
    assert both.encode("he", "an").tokens == ["<s>", SPACE, "he", "</s>", "<s>", f"{SPACE}a", "n", "</s>"]


# Byte-level BPE


def byte_level_metadata(pre: str | None, merges: list[str] = [], **changes: Any) -> dict[str, Any]:  # noqa: B006
    alphabet = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 324))]
    specials = ["<bos>", "<eos>", "<|im_end|>"]
    tokens = [*specials, *alphabet, *(merge.replace(" ", "", 1) for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **{f"tokenizer.ggml.{name}": value for name, value in changes.items()},
    }


def pieces(pre: str, text: str) -> list[str]:
    """How a splitting rule cuts `text`, before any merge."""
    tokenizer = load(tokenizer_files(byte_level_metadata(pre)))
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "I'm 2024  ok", ["I", "'m", " 2024", " ", " ok"]),
        ("smollm", "I'm 2024  7", ["I", "'m", " ", "2", "0", "2", "4", "  ", "7"]),
        ("llama-bpe", "I'M 2024\n\nok()", ["I", "'M", " ", "202", "4", "\n\n", "ok", "()"]),
        ("qwen2", "I'M 2024\n\nok()", ["I", "'M", " ", "2", "0", "2", "4", "\n\n", "ok", "()"]),
        ("tekken", "I'm helloWorld 20", ["I", "'m", " hello", "World", " ", "2", "0"]),
    ],
)
def test_text_is_split_as_each_rule_says(pre: str, text: str, expected: list[str]) -> None:
    assert pieces(pre, text) == expected


def test_merges_apply_within_a_piece_only() -> None:
    metadata = byte_level_metadata("gpt-2", ["a b", "ab c", "Ġ ab"])
    assert load(tokenizer_files(metadata)).encode("abc ab").tokens == ["abc", "Ġab"]


def test_a_word_that_is_a_token_needs_no_merges_where_the_rule_says_so() -> None:
    for pre, expected in (("llama-bpe", ["abc"]), ("gpt-2", ["a", "b", "c"])):
        metadata = byte_level_metadata(pre)
        metadata["tokenizer.ggml.tokens"].append("abc")
        metadata["tokenizer.ggml.token_type"].append(NORMAL)
        assert load(tokenizer_files(metadata)).encode("abc", add_special_tokens=False).tokens == expected


def test_llama_3_texts_begin_with_bos_unless_the_file_says_otherwise() -> None:
    assert load(tokenizer_files(byte_level_metadata("llama-bpe"))).encode("a").tokens == ["<bos>", "a"]
    assert load(tokenizer_files(byte_level_metadata("llama-bpe", add_bos_token=False))).encode("a").tokens == ["a"]
    assert load(tokenizer_files(byte_level_metadata("qwen2"))).encode("a").tokens == ["a"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "tekken"])
def test_any_text_survives_the_byte_level(pre: str, text: str) -> None:
    tokenizer = load(tokenizer_files(byte_level_metadata(pre, ["Ġ t", "h e"])))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


# Facts beside the tokenizer


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eot_token_id": 5}, [1, 5]),
        ({"eot_token_id": 1, "eom_token_id": 7}, [1, 7]),
        ({}, [1, 2]),
        ({"eot_token_id": 5, "eom_token_id": 9999}, [1, 5]),
    ],
)
def test_every_token_that_ends_a_turn_is_listed(changes: dict[str, int], expected: list[int]) -> None:
    files = tokenizer_files(byte_level_metadata("gpt-2", **changes))
    assert json.loads(files["generation_config.json"]) == {"eos_token_id": expected}


def test_the_chat_template_is_kept_where_there_is_one() -> None:
    metadata = byte_level_metadata("gpt-2")
    assert "chat_template.jinja" not in tokenizer_files(metadata)
    files = tokenizer_files(metadata | {"tokenizer.chat_template": "{{ 'é' }}"})
    assert files["chat_template.jinja"].decode() == "{{ 'é' }}"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (byte_level_metadata("whisper"), "splits text as 'whisper'; known are default, gpt-2"),
        (byte_level_metadata(None), r"does not say how it splits text \(tokenizer\.ggml\.pre\)"),
        (byte_level_metadata("gpt-2", model="t5"), "kind 't5' are not supported; 'gpt2' and 'llama' are"),
        (byte_level_metadata("gpt-2", tokens=[]), "has no tokenizer"),
        (byte_level_metadata("gpt-2", token_type=[1]), "tokens and 1 token types"),
        (byte_level_metadata("gpt-2", eos_token_id=9999), "eos_token is 9999"),
        (
            byte_level_metadata("gpt-2", eos_token_id=None, eot_token_id=9999, eom_token_id=-1),
            r"ends texts with 9999, -1, it has \d+ tokens",
        ),
        (byte_level_metadata("gpt-2") | {"tokenizer.ggml.merges": ["a 日"]}, "merge 'a 日' names pieces"),
        (byte_level_metadata("gpt-2", token_type=["x"]), r"malformed: Expected `int`, got `str` - at `\$\.token_type"),
        (sentence_piece_metadata(scores=[1.0]), "tokens and 1 scores"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_refused(metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelRejected, match=reason):
        tokenizer_files(metadata)
