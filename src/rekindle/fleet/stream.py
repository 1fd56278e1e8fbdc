"""One open request as its replica sees it: what was asked, what has arrived, what its reader has taken.

Nothing is kept chunk by chunk: tokens that nobody has taken yet come out as one chunk, so a reader that is slow, or
does not read at all, costs no more than the output it asked for.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from rekindle import errors
from rekindle.errors import EngineFailed, RekindleError, RequestError, RetryLater, StreamBroken
from rekindle.protocol.generation import FinishReason, GenerateRequest, TokenChunk, TokenLogprobs
from rekindle.protocol.identity import RequestId


class RequestStream:
    """The output of one request across all epochs.

    `opened_s` is when it came. `is_submitted`: the present engine has been given the request. `num_crashes` counts the
    engines that died of it, or of one of several of which it is one.
    """

    def __init__(self, request: GenerateRequest, opened_s: float = 0.0) -> None:
        self._request, self.opened_s = request, opened_s
        self._token_ids = list(request.generated_token_ids)
        self._num_taken = len(self._token_ids)
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._cached_tokens: int | None = None
        self._has_prompt_logprobs = self._has_cached_tokens = False
        self._finish_reason: FinishReason | None = None
        self._failure: RekindleError | None = None
        self._news = asyncio.Event()
        self._epoch = request.epoch
        self.is_submitted = False
        self.num_crashes = 0

    @property
    def request_id(self) -> RequestId:
        return self._request.request_id

    @property
    def is_finished(self) -> bool:
        """Whether the engine has said all there is to say."""
        return self._finish_reason is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing more can arrive: it is finished, or has failed."""
        return self.is_finished or self._failure is not None

    @property
    def request(self) -> GenerateRequest:
        """What to submit now: the request with all tokens received so far, under the present epoch."""
        sampling = self._request.sampling
        if self._has_prompt_logprobs:
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(self._request, epoch=self._epoch, generated_token_ids=tuple(self._token_ids), sampling=sampling)

    def begin_epoch(self) -> None:
        """Prepare to be submitted to another engine."""
        self._epoch += 1
        self.is_submitted = False

    def push(self, chunk: TokenChunk) -> int:
        """Take in what is new of a chunk; returns how many tokens that is. Chunks of earlier epochs hold nothing new.

        Raises:
            StreamBroken: tokens before the chunk are missing, or its log-probabilities do not match its tokens.
        """
        if chunk.epoch != self._epoch or self.is_over:
            return 0
        num_known = len(self._token_ids) - chunk.offset
        if num_known < 0:
            raise StreamBroken(
                f"request {self.request_id}: a chunk begins at token {chunk.offset}, but only the tokens before "
                f"{len(self._token_ids)} have arrived"
            )
        if chunk.logprobs is not None:
            if len(chunk.logprobs) != len(chunk.token_ids):
                raise StreamBroken(
                    f"request {self.request_id}: {len(chunk.logprobs)} log-probabilities came with "
                    f"{len(chunk.token_ids)} tokens"
                )
            self._logprobs += chunk.logprobs[num_known:]
        fresh = chunk.token_ids[num_known:]
        self._token_ids += fresh
        self._note_prompt(chunk)
        self._finish_reason = chunk.finish_reason
        if chunk.finish_reason is FinishReason.ERROR:
            self._failure = error_of(chunk)
        if fresh or self.is_over:
            self._news.set()
        return len(fresh)

    def fail(self, error: RekindleError) -> None:
        """End the stream with an error, which its reader meets after the tokens that have arrived."""
        if not self.is_over:
            self._failure = error
            self._news.set()

    async def take(self) -> TokenChunk:
        """Wait for news; returns all that has arrived since the last call as one chunk.

        Raises:
            RekindleError: the stream has failed, and everything before that was taken.
        """
        await self._news.wait()
        num_new = len(self._token_ids) - self._num_taken
        if self._failure is not None and not num_new:
            raise self._failure
        chunk = TokenChunk(
            request_id=self.request_id,
            epoch=self._epoch,
            offset=self._num_taken,
            token_ids=tuple(self._token_ids[self._num_taken :]),
            finish_reason=self._finish_reason if self._failure is None else None,
            logprobs=None if self._request.sampling.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            cached_tokens=self._cached_tokens,
        )
        self._num_taken = len(self._token_ids)
        self._logprobs.clear()
        self._prompt_logprobs = self._cached_tokens = None
        if not self.is_over:
            self._news.clear()
        return chunk

    def _note_prompt(self, chunk: TokenChunk) -> None:
        """What is known of the prompt counts once, though every epoch tells it anew."""
        if chunk.prompt_logprobs is not None and not self._has_prompt_logprobs:
            self._prompt_logprobs = chunk.prompt_logprobs
            self._has_prompt_logprobs = True
        if chunk.cached_tokens is not None and not self._has_cached_tokens:
            self._cached_tokens = chunk.cached_tokens
            self._has_cached_tokens = True


def error_of(chunk: TokenChunk) -> RekindleError:
    """The error that a chunk with `FinishReason.ERROR` stands for."""
    message, refusal = chunk.error or "the engine gave the request up without saying why", chunk.refusal
    kind = getattr(errors, refusal.kind, None) if refusal is not None else None
    if refusal is None or not isinstance(kind, type):
        return EngineFailed(message)
    if issubclass(kind, RequestError):
        return kind(message, field=refusal.field, code=refusal.code)
    if issubclass(kind, RetryLater):
        return kind(message, retry_after_s=refusal.retry_after_s or 1.0)
    return EngineFailed(message)
