"""Fields of OpenAI's and vLLM's requests that change nothing here: which are ignored, and which are refused by name
unless they ask for what happens anyway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rekindle.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class KnownFields:
    """`ignored` fields are accepted whatever they hold. `unsupported` ones are accepted when null, or with one of the
    values listed, which ask for nothing."""

    ignored: frozenset[str]
    unsupported: Mapping[str, tuple[Any, ...]]


_COMMON_IGNORED = frozenset({
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "request_id",
    "safety_identifier", "service_tier", "store", "user",
})  # fmt: skip

_COMMON_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "lora_path": (),
    "moderation": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

CHAT_FIELDS = KnownFields(
    ignored=_COMMON_IGNORED | {"parallel_tool_calls", "prediction", "reasoning_effort", "verbosity"},
    unsupported={
        **_COMMON_UNSUPPORTED,
        "audio": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "mm_processor_kwargs": ({},),
        "modalities": (["text"],),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "web_search_options": (),
    },
)

COMPLETION_FIELDS = KnownFields(
    ignored=_COMMON_IGNORED,
    unsupported={
        **_COMMON_UNSUPPORTED,
        "prompt_embeds": (),
        "response_format": ({"type": "text"},),
        "suffix": ("",),
    },
)

ADAPTER_FIELDS = KnownFields(ignored=frozenset(), unsupported={})


def keep_supported(body: Mapping[str, Any], known: KnownFields, supported: Iterable[str]) -> dict[str, Any]:
    """The fields of `body` that a schema reads.

    Raises:
        InvalidRequest: a field is unsupported and asks for something, or is unknown.
    """
    names = frozenset(supported)
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name in names:
            kept[name] = value
        elif name in known.unsupported:
            if value is not None and value not in known.unsupported[name]:
                raise InvalidRequest(
                    f"`{name}` is not supported by this server; leave it out", field=name, code="unsupported_parameter"
                )
        elif name not in known.ignored:
            raise _unknown(name, names | known.ignored | known.unsupported.keys())
    return kept


def _unknown(name: str, known: frozenset[str]) -> InvalidRequest:
    shown = name if len(name) <= 64 else f"{name[:64]}..."
    close = get_close_matches(shown, known, n=1)
    hint = f". Did you mean `{close[0]}`?" if close else ""
    return InvalidRequest(
        f"Unrecognized request argument supplied: {shown}{hint}", field=shown, code="unknown_parameter"
    )
