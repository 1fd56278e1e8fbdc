"""From a checked body to a job: prompts become token ids, fields become sampling settings, `n` becomes sequences."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rekindle.clock import Clock
from rekindle.errors import InvalidRequest
from rekindle.gateway.choice import Choice, OutputOptions
from rekindle.gateway.encoders import ChatEncoder, CompletionEncoder, Echo, Heading, ReplyForm
from rekindle.gateway.messages import plain_messages
from rekindle.gateway.reply import GenerationJob
from rekindle.gateway.sampling import Length, check_token_ids, fit_context, sampling_params, seed_of_choice
from rekindle.gateway.schemas import ChatBody, CompletionBody, GenerationBody
from rekindle.gateway.seams import RegisteredAdapter
from rekindle.gateway.served_model import ServedModel
from rekindle.gateway.settings import GatewaySettings
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import RequestId
from rekindle.protocol.sampling import MAX_TOP_LOGPROBS, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""
DIGEST_CHARS = 8


@dataclass(frozen=True, slots=True)
class Target:
    """What a request's `model` field stands for at this moment; `name` is as the client wrote it."""

    name: str
    model: ServedModel
    adapter: RegisteredAdapter | None


class JobFactory:
    """Turns bodies into jobs."""

    def __init__(self, settings: GatewaySettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock

    async def chat(self, body: ChatBody, target: Target) -> GenerationJob:
        """A job for /v1/chat/completions.

        Raises:
            InvalidRequest: a field is out of its range, or the prompt does not fit the model.
        """
        _check_chat(body)
        num_choices = self._num_choices(body, num_prompts=1)
        prompt = await _chat_prompt(body, target)
        if body.max_completion_tokens is not None:
            length = Length("max_completion_tokens", body.max_completion_tokens, least=1)
        else:
            length = Length("max_tokens", body.max_tokens, least=1)
        params = sampling_params(
            body,
            target.model,
            max_tokens=fit_context(len(prompt), length, target.model.max_context_tokens),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
        heading = self._heading("chatcmpl", target)
        form = _form(body, with_logprobs=params.logprobs is not None)
        encoder = ChatEncoder(heading, target.model.tokenizer, form)
        sequences = _sequences(heading.id, body, target, [(prompt, params)], num_choices)
        return GenerationJob(
            base=target.model.base,
            adapter=target.adapter,
            sequences=sequences,
            encoder=encoder,
            prompt_tokens=len(prompt),
            choices_per_prompt=num_choices,
            stream=bool(body.stream),
            include_usage=form.include_usage,
        )

    async def completion(self, body: CompletionBody, target: Target) -> GenerationJob:
        """A job for /v1/completions.

        Raises:
            InvalidRequest: a field is out of its range, or a prompt does not fit the model.
        """
        num_choices = self._num_choices(body, num_prompts=len(body.prompt))
        _check_completion(body, num_choices)
        prompts = await _prompts_ids(body, target.model)
        prompt_logprobs = body.prompt_logprobs
        if body.echo and body.logprobs is not None:
            prompt_logprobs = max(body.logprobs, body.prompt_logprobs or 0)
        length = Length("max_tokens", body.max_tokens, default=DEFAULT_COMPLETION_TOKENS)
        settings = [
            sampling_params(
                body,
                target.model,
                max_tokens=fit_context(len(prompt), length, target.model.max_context_tokens),
                logprobs=body.logprobs,
                prompt_logprobs=prompt_logprobs,
            )
            for prompt in prompts
        ]
        heading = self._heading("cmpl", target)
        form = _form(body, with_logprobs=body.logprobs is not None)
        encoder = CompletionEncoder(
            heading,
            target.model.tokenizer,
            form,
            choices_per_prompt=num_choices,
            echoes=_echoes(body, prompts, target.model) if body.echo else (),
        )
        return GenerationJob(
            base=target.model.base,
            adapter=target.adapter,
            sequences=_sequences(heading.id, body, target, list(zip(prompts, settings, strict=True)), num_choices),
            encoder=encoder,
            prompt_tokens=sum(len(prompt) for prompt in prompts),
            choices_per_prompt=num_choices,
            stream=bool(body.stream),
            include_usage=form.include_usage,
        )

    def _num_choices(self, body: GenerationBody, *, num_prompts: int) -> int:
        num_choices = 1 if body.n is None else body.n
        if not 1 <= num_choices <= self._settings.max_choices:
            raise InvalidRequest(
                f"`n` must lie in [1, {self._settings.max_choices}], got {num_choices}", field="n", code="invalid_value"
            )
        if num_choices * num_prompts > self._settings.max_sequences:
            raise InvalidRequest(
                f"{num_prompts} prompts with {num_choices} choices each are {num_choices * num_prompts} sequences; the "
                f"limit is {self._settings.max_sequences}. Send fewer prompts in one request.",
                field="prompt",
                code="invalid_value",
            )
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("`stream_options` is only allowed when `stream` is true", field="stream_options")
        if body.stream and body.prompt_logprobs is not None:
            raise InvalidRequest("`prompt_logprobs` is not available in a stream", field="prompt_logprobs")
        return num_choices

    def _heading(self, prefix: str, target: Target) -> Heading:
        fingerprint = f"fp_{target.model.base.manifest.digest[:DIGEST_CHARS]}"
        if target.adapter is not None:
            fingerprint += f"_{target.adapter.manifest.digest[:DIGEST_CHARS]}"
        return Heading(f"{prefix}-{uuid.uuid4().hex}", int(self._clock.unix_s()), target.name, fingerprint)


def _check_chat(body: ChatBody) -> None:
    top = body.top_logprobs
    if top is not None and not body.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true", field="top_logprobs", code="invalid_value")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"`top_logprobs` must lie in [0, {MAX_TOP_LOGPROBS}], got {top}", field="top_logprobs", code="invalid_value"
        )
    if body.add_generation_prompt and body.continue_final_message:
        raise InvalidRequest(
            "`add_generation_prompt` and `continue_final_message` exclude each other; set one of them",
            field="continue_final_message",
            code="invalid_value",
        )


def _check_completion(body: CompletionBody, num_choices: int) -> None:
    if body.best_of is not None and body.best_of != num_choices:
        raise InvalidRequest(
            f"`best_of` is not supported beyond `n`: leave it out or set it to {num_choices}",
            field="best_of",
            code="unsupported_parameter",
        )


async def _chat_prompt(body: ChatBody, target: Target) -> tuple[int, ...]:
    template = await target.model.chat_template(target.adapter)
    messages = plain_messages(body.messages)
    add_prompt = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    text = await target.model.render(
        template,
        messages,
        add_generation_prompt=add_prompt,
        continue_final_message=bool(body.continue_final_message),
        extra=body.chat_template_kwargs,
    )
    (ids,) = await target.model.encode([text], add_special_tokens=bool(body.add_special_tokens))
    return _not_empty(ids, "messages")


async def _prompts_ids(body: CompletionBody, model: ServedModel) -> list[tuple[int, ...]]:
    """Token ids of each prompt; one request's prompts are all texts or all token ids."""
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    if texts:
        encoded = await model.encode(texts, add_special_tokens=body.add_special_tokens is not False)
        return [_not_empty(ids, "prompt") for ids in encoded]
    prompts = [prompt for prompt in body.prompt if not isinstance(prompt, str)]
    for prompt in prompts:
        check_token_ids(prompt, model.base.manifest.vocab_size, "prompt")
    return prompts


def _not_empty(ids: tuple[int, ...], field: str) -> tuple[int, ...]:
    if not ids:
        raise InvalidRequest(
            f"`{field}` has no tokens, and this model has no token that begins a text; send at least one character",
            field=field,
            code="invalid_value",
        )
    return ids


def _echoes(body: CompletionBody, prompts: Sequence[tuple[int, ...]], model: ServedModel) -> list[Echo]:
    skip = body.skip_special_tokens is not False
    return [
        Echo(given if isinstance(given, str) else model.tokenizer.decode(ids, skip_special_tokens=skip), ids)
        for given, ids in zip(body.prompt, prompts, strict=True)
    ]


def _form(body: GenerationBody, *, with_logprobs: bool) -> ReplyForm:
    options = body.stream_options
    return ReplyForm(
        with_logprobs=with_logprobs,
        with_prompt_logprobs=body.prompt_logprobs is not None,
        include_usage=bool(body.stream and options and options.include_usage),
    )


def _sequences(
    job_id: str,
    body: GenerationBody,
    target: Target,
    prompts: Sequence[tuple[tuple[int, ...], SamplingParams]],
    num_choices: int,
) -> tuple[tuple[GenerateRequest, Choice], ...]:
    options = OutputOptions(
        stops=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
    )
    sequences = []
    for place, (prompt, params) in enumerate(prompts):
        for number in range(num_choices):
            index = place * num_choices + number
            request = GenerateRequest(
                request_id=RequestId(f"{job_id}-{index}"),
                prompt_token_ids=prompt,
                sampling=replace(params, seed=seed_of_choice(params.seed, number)),
                adapter=target.adapter.manifest.digest if target.adapter else None,
                tenant_salt=body.cache_salt or "",
                priority=body.priority or 0,
                ttft_slo_s=None if body.ttft_slo_ms is None else body.ttft_slo_ms / 1000,
            )
            sequences.append((request, Choice(index, target.model.tokenizer, options)))
    return tuple(sequences)
