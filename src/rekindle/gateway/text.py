"""Text to token ids and back.

Owns the meaning of "the text of a sequence": the bytes of its tokens, one after the other, read as UTF-8 with what is
invalid replaced. Decoding is therefore linear and independent of how tokens were grouped into chunks, and the bytes
of a token, as log-probability records report them, are the bytes it adds to the text.

Knows `tokenizer.json` (byte-level and SentencePiece-style vocabularies) and the few facts about special tokens that
lie beside it; knows nothing of requests.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from rekindle.errors import ConfigurationError, InvalidRequest

SENTENCEPIECE_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What lies beside a tokenizer about its special tokens. `named` maps "bos_token", "eos_token" and the like to
    their text. `add_bos` is None where the tokenizer itself decides whether a text begins with the bos token."""

    named: Mapping[str, str]
    add_bos: bool | None = None


class Tokenizer:
    """A model's vocabulary: encodes text, and knows the bytes each token stands for."""

    def __init__(self, tokenizer: FastTokenizer, special: SpecialTokens) -> None:
        self._tokenizer = tokenizer
        self.special = special
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )
        bos = special.named.get("bos_token")
        self._bos_id = None if bos is None else tokenizer.token_to_id(bos)
        self._kinds = _decoder_kinds(json.loads(tokenizer.to_str())["decoder"])
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read `tokenizer.json` and, where present, `tokenizer_config.json` or `config.json` for special tokens.

        Raises:
            ConfigurationError: the tokenizer is missing or cannot be read.
        """
        path = directory / "tokenizer.json"
        try:
            tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:
            raise ConfigurationError(f"cannot read {path}: {error}; import the model again") from error
        return cls(tokenizer, read_special_tokens(directory, tokenizer))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`: about a millisecond for 4096 characters.

        Raises:
            InvalidRequest: the text is not valid Unicode.
        """
        try:
            # encode_batch lets go of the interpreter lock, encode does not.
            ids: list[int] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest("the text is not valid Unicode: it holds a lone surrogate") from error
        if add_special_tokens and self._bos_id is not None and self.special.add_bos is not None:
            return self._with_bos_rule(ids, text)
        return ids

    def _with_bos_rule(self, ids: list[int], text: str) -> list[int]:
        begins_with_bos = bool(ids) and ids[0] == self._bos_id
        if self.special.add_bos and not begins_with_bos and self._bos_id is not None:
            return [self._bos_id, *ids]
        if not self.special.add_bos and begins_with_bos and not text.startswith(self.special.named["bos_token"]):
            return ids[1:]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text; empty for ids without a token (padding rows of the vocabulary)."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._derive_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """The token read alone, invalid bytes replaced."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """The whole text of a finished sequence."""
        decoder = Detokenizer(self, skip_special_tokens=skip_special_tokens)
        return decoder.push(token_ids) + decoder.flush()

    def _derive_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._tokenizer.get_added_tokens_decoder():
            return token.encode("utf-8")
        if "ByteLevel" in self._kinds:
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            return token.encode("utf-8") if None in values else bytes(value for value in values if value is not None)
        if "ByteFallback" in self._kinds and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._kinds & {"Replace", "Metaspace"}:
            return token.replace(SENTENCEPIECE_SPACE, " ").encode("utf-8")
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False)).encode("utf-8")


class Detokenizer:
    """Turns one sequence's tokens into text as they arrive, never splitting a character."""

    __slots__ = ("_decoder", "_skipped", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters completed by these tokens."""
        token_bytes, skipped = self._tokenizer.token_bytes, self._skipped
        return self._decoder.decode(b"".join([token_bytes(i) for i in token_ids if i not in skipped]))

    def flush(self) -> str:
        """The replacement for a character the sequence left unfinished; empty otherwise."""
        return self._decoder.decode(b"", final=True)


def read_special_tokens(directory: Path, tokenizer: FastTokenizer) -> SpecialTokens:
    """Names of special tokens from `tokenizer_config.json`, or, where a model has none, ids from `config.json`."""
    settings = read_json_object(directory / "tokenizer_config.json")
    named = {name: text for name, text in settings.items() if name.endswith("_token") and isinstance(text, str)}
    model_settings = read_json_object(directory / "config.json")
    for name in ("bos_token", "eos_token"):
        ids = model_settings.get(f"{name}_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if name not in named and isinstance(first, int) and (text := tokenizer.id_to_token(first)) is not None:
            named[name] = text
    add_bos = settings.get("add_bos_token")
    return SpecialTokens(named, add_bos if isinstance(add_bos, bool) else None)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the model; empty where the model has no such file.

    Raises:
        ConfigurationError: the file is there but is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}; import the model again") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} holds a {type(value).__name__}, not an object; import the model again")
    return value


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> frozenset[str]:
    if decoder is None:
        return frozenset()
    if decoder["type"] == "Sequence":
        return frozenset().union(*(_decoder_kinds(part) for part in decoder["decoders"]))
    return frozenset({decoder["type"]})


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(v): v for v in printable} | {chr(0x100 + place): v for place, v in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
