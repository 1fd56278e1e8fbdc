"""The text side of a base model this server runs: tokenizer, chat templates, sampling defaults, context length."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path

from rekindle.clock import Clock
from rekindle.errors import InvalidRequest
from rekindle.gateway.chat_template import ChatTemplate, read_template_source
from rekindle.gateway.seams import RegisteredAdapter, ServedBase
from rekindle.gateway.text import Tokenizer, read_json_object
from rekindle.protocol.identity import AdapterDigest

MAX_ADAPTER_TEMPLATES = 256
"""Compiled templates of adapters kept at a time."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets where it says nothing, as the model's `generation_config.json` advises."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ServedModel:
    """Reads what lies beside a base model's weights once, at the start of the server."""

    def __init__(self, base: ServedBase, clock: Clock) -> None:
        """Load the tokenizer and the generation settings from `base.directory`.

        Raises:
            ConfigurationError: a file is missing or cannot be read.
        """
        self.base = base
        self.tokenizer = Tokenizer.from_directory(base.directory)
        settings = read_json_object(base.directory / "generation_config.json")
        self.defaults = _sampling_defaults(settings)
        self.eos_token_ids = base.manifest.eos_token_ids + _extra_eos(settings, base.manifest.eos_token_ids)
        self._clock = clock
        self._base_template = self._compile(base.directory)
        self._adapter_templates: OrderedDict[AdapterDigest, ChatTemplate | None] = OrderedDict()

    @property
    def max_context_tokens(self) -> int:
        """Prompt and completion together; what the engine's memory allows, once it has said so."""
        ready = self.base.replica.ready
        context_length = self.base.manifest.context_length
        return context_length if ready is None else min(context_length, ready.max_context_tokens)

    async def chat_template(self, adapter: RegisteredAdapter | None) -> ChatTemplate:
        """The template stored with the adapter's version, else the base model's.

        Raises:
            InvalidRequest: there is neither, or the adapter's is not valid.
        """
        template = await self._adapter_template(adapter) if adapter else None
        template = template or self._base_template
        if template is None:
            raise InvalidRequest(
                f"the model {self.base.name!r} has no chat template; send the prompt to /v1/completions, or add a "
                "chat_template.jinja to the model's directory and import it again",
                field="messages",
                code="no_chat_template",
            )
        return template

    async def _adapter_template(self, adapter: RegisteredAdapter) -> ChatTemplate | None:
        digest = adapter.manifest.digest
        if digest in self._adapter_templates:
            self._adapter_templates.move_to_end(digest)
            return self._adapter_templates[digest]
        template = await asyncio.to_thread(self._compile, adapter.path.parent)
        self._adapter_templates[digest] = template
        if len(self._adapter_templates) > MAX_ADAPTER_TEMPLATES:
            self._adapter_templates.popitem(last=False)
        return template

    def _compile(self, directory: Path) -> ChatTemplate | None:
        source = read_template_source(directory)
        return None if source is None else ChatTemplate(source, self.tokenizer.special.named, self._clock)


def _sampling_defaults(settings: dict[str, object]) -> SamplingDefaults:
    advised = {
        field.name: settings[field.name] for field in fields(SamplingDefaults) if _is_number(settings, field.name)
    }
    return SamplingDefaults(**advised)  # type: ignore[arg-type]  # each value was just seen to be a number


def _is_number(settings: dict[str, object], name: str) -> bool:
    return isinstance(settings.get(name), int | float) and not isinstance(settings[name], bool)


def _extra_eos(settings: dict[str, object], known: tuple[int, ...]) -> tuple[int, ...]:
    advised = settings.get("eos_token_id")
    ids = advised if isinstance(advised, list) else [advised]
    return tuple(i for i in ids if isinstance(i, int) and i not in known)
