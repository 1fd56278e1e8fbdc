"""The open requests of a replica: their order, which of them the engine may have now, and who is blamed when it dies.

Requests go to the engine in the order they came. After a crash those that were with the engine are suspects and go to
the next one by one, each when the one before has given a token, and everything that came later waits until all of them
have. So the request that kills engines is alone with others that have shown to be harmless when it kills the second,
and takes the blame for that; without a suspect on trial, all requests present share the blame. A request blamed for
`max_crashes` crashes is given up.
"""

from __future__ import annotations

from collections.abc import Iterator

from rekindle.fleet.stream import RequestStream
from rekindle.protocol.identity import RequestId


class OpenRequests:
    """See the module. Knows neither processes nor time."""

    def __init__(self, max_crashes: int) -> None:
        self._max_crashes = max_crashes
        self._streams: dict[RequestId, RequestStream] = {}
        self._queue: dict[RequestId, RequestStream] = {}
        self._on_trial: RequestStream | None = None

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[RequestStream]:
        """All of them, in the order they came."""
        return iter(tuple(self._streams.values()))

    def get(self, request_id: RequestId) -> RequestStream | None:
        return self._streams.get(request_id)

    @property
    def has_running(self) -> bool:
        """Whether the engine has a request that it has not finished."""
        return any(stream.is_submitted and not stream.is_over for stream in self._streams.values())

    def add(self, stream: RequestStream) -> None:
        """Put a request at the end of the queue; its id must be new."""
        self._streams[stream.request_id] = self._queue[stream.request_id] = stream

    def take_next(self) -> RequestStream | None:
        """The request to submit now, from here on counted as submitted; None if there is none, or it has to wait."""
        if self._on_trial is not None or not self._queue:
            return None
        stream = self._queue.pop(next(iter(self._queue)))
        stream.is_submitted = True
        if stream.num_crashes:
            self._on_trial = stream
        return stream

    def note_progress(self, stream: RequestStream) -> bool:
        """A stream has given a token or is over; returns whether others may be submitted now that had to wait."""
        if stream is not self._on_trial:
            return False
        self._on_trial = None
        return True

    def remove(self, stream: RequestStream) -> bool:
        """Forget a request; returns whether the engine still computes it."""
        del self._streams[stream.request_id]
        self._queue.pop(stream.request_id, None)
        self.note_progress(stream)
        return stream.is_submitted and not stream.is_finished

    def take_back(self) -> None:
        """Queue what is open for the next engine; nobody is to blame."""
        self._on_trial = None
        self._queue = {name: stream for name, stream in self._streams.items() if not stream.is_over}
        for stream in self._queue.values():
            if stream.is_submitted:
                stream.begin_epoch()

    def engine_lost(self) -> list[RequestStream]:
        """Queue what is open for the next engine, and return the requests that are given up instead."""
        present = [stream for stream in self._streams.values() if stream.is_submitted and not stream.is_over]
        blamed = present if self._on_trial is None else [self._on_trial]
        for stream in blamed:
            stream.num_crashes += 1
        self.take_back()
        condemned = [stream for stream in self._queue.values() if stream.num_crashes >= self._max_crashes]
        for stream in condemned:
            del self._queue[stream.request_id]
        return condemned
