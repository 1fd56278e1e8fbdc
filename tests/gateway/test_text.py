"""Tokens to text: equal to the tokenizer's own decoding, in any grouping."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rekindle.errors import ConfigurationError
from rekindle.gateway.text import Detokenizer, SpecialTokens
from rekindle.gateway.text import Tokenizer as GatewayTokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "größe 日本 naïve café 🙂"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    tokenizer.add_tokens([AddedToken("two words", normalized=False)])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Pieces with a visible space and bytes as a last resort, as Llama 2, Mistral and Gemma have them."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "▁", "▁hello", "▁world", "é", "ab"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


BYTE_LEVEL = byte_level()
SENTENCEPIECE = sentencepiece_like()


def wrapped(tokenizer: Tokenizer, **special) -> GatewayTokenizer:
    return GatewayTokenizer(tokenizer, SpecialTokens(special.pop("named", {}), **special))


def spelled(tokenizer: GatewayTokenizer, groups: list[list[int]], *, skip: bool) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return "".join(detokenizer.push(group) for group in groups) + detokenizer.flush()


def grouped(ids: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = sorted(min(cut, len(ids)) for cut in cuts)
    return [ids[start:end] for start, end in zip([0, *bounds], [*bounds, len(ids)], strict=True)]


IDS = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=30)
CUTS = st.lists(st.integers(0, 30), max_size=6)


@given(IDS, CUTS, st.booleans())
def test_any_byte_level_tokens_in_any_groups_spell_what_the_tokenizer_decodes(ids, cuts, skip):
    assert spelled(wrapped(BYTE_LEVEL), grouped(ids, cuts), skip=skip) == (
        BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    )


@given(st.text(max_size=30), CUTS)
def test_text_survives_encoding_and_piecewise_decoding(text, cuts):
    ids = BYTE_LEVEL.encode(text).ids
    assert spelled(wrapped(BYTE_LEVEL), grouped(ids, cuts), skip=False) == text


@given(st.lists(st.sampled_from([258 + 4, 258 + 5, 258 + 6, 3 + 0xC3, 3 + 0xA9, 3 + 65, 1]), max_size=20), CUTS)
def test_any_grouping_of_sentencepiece_tokens_spells_the_same_text(ids, cuts):
    tokenizer = wrapped(SENTENCEPIECE)
    whole = spelled(tokenizer, [ids], skip=True)
    assert spelled(tokenizer, grouped(ids, cuts), skip=True) == whole
    if "\ufffd" not in whole:
        assert whole == SENTENCEPIECE.decode(ids, skip_special_tokens=True)


def test_the_space_before_a_sentencepiece_word_is_kept_at_the_start_of_a_completion():
    ids = [SENTENCEPIECE.token_to_id("▁hello"), SENTENCEPIECE.token_to_id("▁world")]
    assert wrapped(SENTENCEPIECE).decode(ids, skip_special_tokens=True) == " hello world"


def test_a_character_is_never_shown_in_halves():
    detokenizer = Detokenizer(wrapped(BYTE_LEVEL), skip_special_tokens=True)
    first, second, *rest = BYTE_LEVEL.encode("🙃").ids
    assert detokenizer.push([first, second]) == ""
    assert detokenizer.push(rest) == "🙃"


def test_a_character_that_is_never_finished_ends_as_a_replacement():
    tokenizer = wrapped(BYTE_LEVEL)
    assert tokenizer.decode(BYTE_LEVEL.encode("a🙃").ids[:-1], skip_special_tokens=True) == "a\ufffd"


def test_the_bytes_of_a_token_are_the_bytes_it_adds():
    tokenizer = wrapped(BYTE_LEVEL)
    ids = BYTE_LEVEL.encode("naïve two words 日本").ids
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == "naïve two words 日本"
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("add_bos", "text", "begins"),
    [(True, "a", True), (True, "<s>a", True), (False, "a", False), (False, "<s>a", True), (None, "a", False)],
)
async def test_whether_a_text_begins_with_bos_is_the_models_own_rule(add_bos, text, begins):
    tokenizer = wrapped(BYTE_LEVEL, named={"bos_token": "<s>"}, add_bos=add_bos)
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert (ids[0] == BYTE_LEVEL.token_to_id("<s>")) is begins
    assert ids.count(BYTE_LEVEL.token_to_id("<s>")) == int(begins)


async def test_a_bos_of_the_tokenizers_own_is_taken_off_where_the_model_says_so():
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    keeps = wrapped(tokenizer, named={"bos_token": "<s>"})
    drops = wrapped(tokenizer, named={"bos_token": "<s>"}, add_bos=False)
    assert keeps.encode("a", add_special_tokens=True)[0] == 0
    assert 0 not in drops.encode("a", add_special_tokens=True)
    assert 0 not in keeps.encode("a", add_special_tokens=False)


async def test_a_long_text_is_encoded_like_a_short_one():
    text = "the quick brown fox " * 2000
    assert wrapped(BYTE_LEVEL).encode(text, add_special_tokens=False) == BYTE_LEVEL.encode(text).ids


def test_special_tokens_are_read_from_the_tokenizers_settings_or_the_models(tmp_path):
    BYTE_LEVEL.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 0]}))
    assert GatewayTokenizer.from_directory(tmp_path).special.named == {"bos_token": "<s>", "eos_token": "</s>"}
    settings = {"bos_token": "<S>", "add_bos_token": True, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    special = GatewayTokenizer.from_directory(tmp_path).special
    assert special.named == {"bos_token": "<S>", "eos_token": "</s>"}
    assert special.add_bos is True


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        GatewayTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        GatewayTokenizer.from_directory(tmp_path)
