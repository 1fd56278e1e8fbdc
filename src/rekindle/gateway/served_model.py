"""The text side of a base model this server runs: tokenizer, chat templates, sampling defaults, context length."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rekindle.clock import Clock
from rekindle.errors import ConfigurationError, InvalidRequest
from rekindle.gateway.chat_template import ChatTemplate, Message, read_template_source
from rekindle.gateway.sampling_defaults import SETTINGS_NAME, sampling_defaults
from rekindle.gateway.seams import RegisteredAdapter, ServedBase
from rekindle.gateway.text import Tokenizer, read_json_object
from rekindle.gateway.worker_threads import WorkerThreads
from rekindle.protocol.identity import AdapterDigest

MAX_ADAPTER_TEMPLATES = 256
"""Compiled templates of adapters kept at a time."""
INLINE_ENCODE_CHARS = 4096
"""Texts up to this length together are encoded on the event loop (about a millisecond)."""
BATCH_TEXTS = 64


class ServedModel:
    """Reads what lies beside a base model's weights once, at the start of the server."""

    def __init__(self, base: ServedBase, clock: Clock, threads: WorkerThreads) -> None:
        """Load the tokenizer, the chat template and the generation settings from `base.directory`. Templates are
        rendered and long texts encoded in `threads`.

        Raises:
            ConfigurationError: a file is missing, cannot be read or holds what cannot be used.
        """
        self.base = base
        self.tokenizer = Tokenizer.from_directory(base.directory)
        settings = read_json_object(base.directory / SETTINGS_NAME)
        self.defaults = sampling_defaults(settings, base.directory)
        self._clock = clock
        self._threads = threads
        self._base_template = self._compile_own()
        self._adapter_templates: OrderedDict[AdapterDigest, ChatTemplate | InvalidRequest | None] = OrderedDict()

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

    async def render(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        extra: Mapping[str, Any] | None,
    ) -> str:
        """`ChatTemplate.render` in a thread: a template is foreign code and may be slow over many messages."""
        async with template.turn:
            return await self._threads.run(
                template.render,
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                extra=extra,
            )

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        """Token ids of each text. More than a little is encoded in threads, in batches, so that streams keep flowing
        and other requests get their turn between them.

        Raises:
            InvalidRequest: a text is not valid Unicode.
        """
        encode = partial(self._encode_batch, add_special_tokens=add_special_tokens)
        if sum(map(len, texts)) <= INLINE_ENCODE_CHARS:
            return encode(texts)
        ids: list[tuple[int, ...]] = []
        for start in range(0, len(texts), BATCH_TEXTS):
            ids += await self._threads.run(encode, texts[start : start + BATCH_TEXTS])
        return ids

    def _encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[tuple[int, ...]]:
        return [tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens)) for text in texts]

    async def _adapter_template(self, adapter: RegisteredAdapter) -> ChatTemplate | None:
        """A template that is not valid is remembered as such, since compiling is slow."""
        digest = adapter.manifest.digest
        if digest in self._adapter_templates:
            self._adapter_templates.move_to_end(digest)
        else:
            self._adapter_templates[digest] = await self._threads.run(self._compiled_or_fault, adapter.path.parent)
            if len(self._adapter_templates) > MAX_ADAPTER_TEMPLATES:
                self._adapter_templates.popitem(last=False)
        template = self._adapter_templates[digest]
        if isinstance(template, InvalidRequest):
            raise InvalidRequest(str(template), field=template.field, code=template.code)
        return template

    def _compiled_or_fault(self, directory: Path) -> ChatTemplate | InvalidRequest | None:
        try:
            return self._compile(directory)
        except InvalidRequest as error:
            return error

    def _compile_own(self) -> ChatTemplate | None:
        try:
            return self._compile(self.base.directory)
        except (InvalidRequest, OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"chat_template.jinja in {self.base.directory} cannot be used: {error}; mend it and import the model "
                "again"
            ) from error

    def _compile(self, directory: Path) -> ChatTemplate | None:
        source = read_template_source(directory)
        return None if source is None else ChatTemplate(source, self.tokenizer.special.named, self._clock)
