"""One open request as its replica's supervisor sees it: what it was, what has arrived, what its reader has taken.

Chunks that nobody has taken yet are merged into one, so a slow reader costs no more than the text it has not read.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from rekindle.errors import RekindleError, StreamBroken
from rekindle.protocol.generation import GenerateRequest, TokenChunk


class RequestStream:
    """The tokens of one request across all epochs."""

    def __init__(self, request: GenerateRequest) -> None:
        self._request = request
        self._token_ids = list(request.generated_token_ids)
        self._pending: TokenChunk | None = None
        self._failure: RekindleError | None = None
        self._changed = asyncio.Event()
        self._has_prompt_logprobs = False
        self._has_cached_tokens = False
        self.epoch = request.epoch
        self.is_submitted = False
        self.num_crashes = 0
        """Crashes of the engine this request was present at, without a token in between."""

    @property
    def request(self) -> GenerateRequest:
        """What to submit now: the request with all tokens received so far, under the present epoch."""
        sampling = self._request.sampling
        if self._has_prompt_logprobs:
            sampling = replace(sampling, prompt_logprobs=None)
        return replace(self._request, epoch=self.epoch, generated_token_ids=tuple(self._token_ids), sampling=sampling)

    def push(self, chunk: TokenChunk) -> None:
        """Take in a chunk: what was received before is dropped.

        Raises:
            StreamBroken: tokens are missing before it.
        """
        if chunk.epoch != self.epoch:
            return
        num_known = len(self._token_ids) - chunk.offset
        if num_known < 0:
            raise StreamBroken(
                f"request {chunk.request_id}: token {chunk.offset} arrived, {len(self._token_ids)} was expected"
            )
        fresh = _without_first(chunk, num_known)
        if self._has_cached_tokens:
            fresh = replace(fresh, cached_tokens=None)
        if fresh.token_ids:
            self.num_crashes = 0
        self._token_ids += fresh.token_ids
        self._has_prompt_logprobs |= fresh.prompt_logprobs is not None
        self._has_cached_tokens |= fresh.cached_tokens is not None
        self._pending = fresh if self._pending is None else _merged(self._pending, fresh)
        self._changed.set()

    def fail(self, error: RekindleError) -> None:
        """End the stream with an error, after what has arrived."""
        self._failure = error
        self._changed.set()

    async def take(self) -> TokenChunk:
        """Wait for the next tokens, all that have arrived since the last call.

        Raises:
            RekindleError: the stream was failed.
        """
        while self._pending is None:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        chunk, self._pending = self._pending, None
        return chunk


def _without_first(chunk: TokenChunk, count: int) -> TokenChunk:
    if not count:
        return chunk
    logprobs = None if chunk.logprobs is None else chunk.logprobs[count:]
    return replace(chunk, offset=chunk.offset + count, token_ids=chunk.token_ids[count:], logprobs=logprobs)


def _merged(first: TokenChunk, second: TokenChunk) -> TokenChunk:
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or ()) + (second.logprobs or ())
    return replace(
        second,
        offset=first.offset,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        cached_tokens=first.cached_tokens if first.cached_tokens is not None else second.cached_tokens,
    )
