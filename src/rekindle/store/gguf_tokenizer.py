"""A tokenizer.json and the facts beside it from GGUF metadata.

Two kinds exist: "gpt2", byte-level BPE whose way of splitting text `tokenizer.ggml.pre` names, and "llama", the
SentencePiece BPE of Llama 1-2, Mistral and Gemma, whose merges follow from the scores of its pieces.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from rekindle.errors import ModelRejected
from rekindle.store.wording import listed

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_PREFIX = "tokenizer.ggml."
_SPACE = "\u2581"
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")
"""Control tokens that end a turn, for files that name no end-of-turn token."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How text is cut before merges apply. `pattern` None: GPT-2's own rule. `whole_words`: a piece that is a token
    needs no merges. `begins_with_bos` holds where the file does not say."""

    pattern: str | None = None
    single_digits: bool = False
    compose_unicode: bool = False
    whole_words: bool = False
    begins_with_bos: bool = False


_SPLITTINGS = {
    "default": _Splitting(),
    "gpt-2": _Splitting(),
    "smollm": _Splitting(single_digits=True),
    "starcoder": _Splitting(single_digits=True),
    "refact": _Splitting(single_digits=True),
    "llama-bpe": _Splitting(_LLAMA3, whole_words=True, begins_with_bos=True),
    "llama3": _Splitting(_LLAMA3, whole_words=True, begins_with_bos=True),
    "llama-v3": _Splitting(_LLAMA3, whole_words=True, begins_with_bos=True),
    "smaug-bpe": _Splitting(_LLAMA3),
    "qwen2": _Splitting(_QWEN2, compose_unicode=True),
    "deepseek-r1-qwen": _Splitting(_QWEN2),
    "tekken": _Splitting(_TEKKEN, whole_words=True, begins_with_bos=True),
}
"""By `tokenizer.ggml.pre`."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The metadata under `tokenizer.ggml.`, by the format's own names."""

    model: str = ""
    pre: str = ""
    tokens: list[str] = field(default_factory=list)
    token_type: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    eot_token_id: int | None = None
    eom_token_id: int | None = None
    unknown_token_id: int | None = None
    padding_token_id: int | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True

    def special_ids(self) -> dict[str, int]:
        """Ids of the special tokens, under Hugging Face's names."""
        ids = {
            "bos_token": self.bos_token_id,
            "eos_token": self.eos_token_id,
            "unk_token": self.unknown_token_id,
            "pad_token": self.padding_token_id,
        }
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    def special_tokens(self) -> dict[str, str]:
        """Text of the special tokens, under Hugging Face's names."""
        return {name: self.tokens[token_id] for name, token_id in self.special_ids().items()}

    def ids(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens)}


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and, where there is one, chat_template.jinja.

    Raises:
        ModelRejected: the kind of tokenizer or its way of splitting text is unknown, or its lists disagree.
    """
    vocabulary = _vocabulary(metadata)
    if vocabulary.model == "gpt2":
        tokenizer, begins_with_bos = _byte_level(vocabulary)
    elif vocabulary.model == "llama":
        tokenizer, begins_with_bos = _sentence_piece(vocabulary), True
    else:
        raise ModelRejected(f"GGUF tokenizers of kind {vocabulary.model!r} are not supported; 'gpt2' and 'llama' are")
    if vocabulary.add_bos_token is not None:
        begins_with_bos = vocabulary.add_bos_token
    adds_bos = begins_with_bos and vocabulary.bos_token_id is not None
    adds_eos = vocabulary.add_eos_token and vocabulary.eos_token_id is not None
    if template := _post_processor(vocabulary, adds_bos=adds_bos, adds_eos=adds_eos):
        tokenizer.post_processor = template
    settings = vocabulary.special_tokens() | {
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        "generation_config.json": json.dumps({"eos_token_id": _end_ids(vocabulary)}).encode(),
    }
    if chat_template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = str(chat_template).encode()
    return files


def _vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    named = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    try:
        vocabulary = msgspec.convert(named, _Vocabulary)
    except msgspec.ValidationError as error:
        raise ModelRejected(f"the GGUF tokenizer's metadata is malformed: {error}") from error
    num_tokens = len(vocabulary.tokens)
    if not num_tokens:
        raise ModelRejected("the GGUF file has no tokenizer; import one that was exported with its vocabulary")
    if not vocabulary.token_type:
        vocabulary = replace(vocabulary, token_type=[_NORMAL] * num_tokens)
    if len(vocabulary.token_type) != num_tokens:
        raise ModelRejected(f"the GGUF tokenizer has {num_tokens} tokens and {len(vocabulary.token_type)} token types")
    for name, token_id in vocabulary.special_ids().items():
        if not 0 <= token_id < num_tokens:
            raise ModelRejected(f"the GGUF tokenizer's {name} is {token_id}, it has {num_tokens} tokens")
    return vocabulary


def _byte_level(vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    """A byte-level BPE, and whether texts begin with the bos token unless the file says otherwise."""
    name = vocabulary.pre
    splitting = _SPLITTINGS.get(name)
    if splitting is None:
        stated = f"splits text as {name!r}" if name else "does not say how it splits text (tokenizer.ggml.pre)"
        raise ModelRejected(
            f"the GGUF tokenizer {stated}; known are {', '.join(_SPLITTINGS)}; "
            "import the Hugging Face directory instead"
        )
    ids = vocabulary.ids()
    merges = [_parse_merge(merge, ids) for merge in vocabulary.merges]
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=splitting.whole_words))
    if splitting.compose_unicode:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if splitting.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if splitting.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(splitting.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, vocabulary)
    return tokenizer, splitting.begins_with_bos


def _parse_merge(merge: str, ids: Mapping[str, int]) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not (left in ids and right in ids and left + right in ids):
        raise ModelRejected(f"the GGUF tokenizer's merge {merge!r} names pieces that are not among its tokens")
    return left, right


def _sentence_piece(vocabulary: _Vocabulary) -> Tokenizer:
    scores = vocabulary.scores
    if len(scores) != len(vocabulary.tokens):
        raise ModelRejected(f"the GGUF tokenizer has {len(vocabulary.tokens)} tokens and {len(scores)} scores")
    model = BPE(
        vocabulary.ids(),
        _merges_from_scores(vocabulary),
        unk_token=vocabulary.special_tokens().get("unk_token"),
        fuse_unk=True,
        byte_fallback=_BYTE in vocabulary.token_type,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    _add_tokens(tokenizer, vocabulary)
    return tokenizer


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; as BPE that is every way to cut every piece in two,
    ranked by the piece's score, then by the ids of the halves."""
    pieces = {
        token: token_id
        for token_id, token in enumerate(vocabulary.tokens)
        if vocabulary.token_type[token_id] in (_NORMAL, _USER_DEFINED)
    }
    ranked = [
        (-vocabulary.scores[token_id], pieces[token[:cut]], pieces[token[cut:]], token, cut)
        for token, token_id in pieces.items()
        for cut in range(1, len(token))
        if token[:cut] in pieces and token[cut:] in pieces
    ]
    ranked.sort()
    return [(token[:cut], token[cut:]) for _, _, _, token, cut in ranked]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Mark the tokens that are found in text before anything else: control tokens and those users defined."""
    kinds = list(zip(vocabulary.tokens, vocabulary.token_type, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind in (_CONTROL, _UNKNOWN)]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED])


def _post_processor(vocabulary: _Vocabulary, *, adds_bos: bool, adds_eos: bool) -> processors.TemplateProcessing | None:
    names = vocabulary.special_tokens()
    before = [names["bos_token"]] if adds_bos else []
    after = [names["eos_token"]] if adds_eos else []
    if not before and not after:
        return None
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[
            (names[name], vocabulary.special_ids()[name])
            for name, used in (("bos_token", adds_bos), ("eos_token", adds_eos))
            if used
        ],
    )


def _end_ids(vocabulary: _Vocabulary) -> list[int]:
    """Tokens that end a text or a turn; those beyond the vocabulary are left out unless nothing else would be left."""
    ids = [vocabulary.eos_token_id, vocabulary.eot_token_id, vocabulary.eom_token_id]
    if vocabulary.eot_token_id is None:
        control = {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.token_type[i] == _CONTROL}
        ids += [control.get(token) for token in _END_OF_TURN]
    stated = list(dict.fromkeys(token_id for token_id in ids if token_id is not None))
    usable = [token_id for token_id in stated if 0 <= token_id < len(vocabulary.tokens)]
    if stated and not usable:
        raise ModelRejected(
            f"the GGUF tokenizer ends texts with {listed([str(token_id) for token_id in stated])}, it has "
            f"{len(vocabulary.tokens)} tokens; export the file again"
        )
    return usable
