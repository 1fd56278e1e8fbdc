"""Every error Rekindle raises on purpose, rooted by what the caller can do about it.

RekindleError
├── RequestError              fix the request
│   ├── InvalidRequest          a field is missing, of the wrong type or out of its range
│   ├── NotFound                no model, adapter or route of that name
│   ├── Conflict                the name is taken, or what it names is in use
│   ├── AdapterRejected         the adapter cannot be served exactly as it was trained
│   └── ModelRejected           the model's files are of a kind that is not supported, or damaged
├── RetryLater                the same request may succeed in a moment
│   ├── Overloaded              a bounded queue is full
│   ├── DeadlineUnreachable     the first token cannot come within the time the request allows
│   └── ReplicaUnavailable      the engine is starting, restarting or draining
├── ConfigurationError        fix the settings or the machine
│   └── StoredFileDamaged       a file of the home is torn, cut short or altered; import it again
└── InternalError             report a bug
    ├── EngineFailed            the engine could not carry out this request
    ├── StreamBroken            chunks arrived with a gap or out of order
    └── PackedDamaged           packed bytes in memory are not what was packed

A message says what was wrong, the value met, the limit and the remedy.
"""

from __future__ import annotations


class RekindleError(Exception):
    """Root of all errors raised on purpose. `str(error)` is fit to show to the caller."""


class RequestError(RekindleError):
    """The caller can mend this by changing the request."""

    def __init__(self, message: str, *, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class InvalidRequest(RequestError):
    """A field of the request is missing, of the wrong type or out of range; `field` names it."""


class NotFound(RequestError):
    """Nothing of that name exists, or the caller may not know that it does."""


class Conflict(RequestError):
    """The request contradicts what exists: a name taken twice, an object still in use."""


class AdapterRejected(RequestError):
    """The adapter is damaged, belongs to another base, or needs mathematics that is not built."""


class ModelRejected(RequestError):
    """The model's files are damaged, incomplete or of an unsupported family or format."""


class RetryLater(RekindleError):
    """The same request may succeed after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(RetryLater):
    """A bounded queue is full."""


class DeadlineUnreachable(RetryLater):
    """The first token cannot come within the time that the request allows for it."""


class ReplicaUnavailable(RetryLater):
    """No engine can take the request now: it is starting, restarting or draining."""


class ConfigurationError(RekindleError):
    """The settings, the home directory or the machine do not allow what was asked."""


class StoredFileDamaged(ConfigurationError):
    """A file of the home directory is not what was written there: torn, cut short or altered. Import it again."""


class InternalError(RekindleError):
    """A fault of Rekindle itself."""


class EngineFailed(InternalError):
    """The engine gave this request up; the message says why."""


class StreamBroken(InternalError):
    """Chunks of one request arrived with a gap, or belong to another epoch."""


class PackedDamaged(InternalError):
    """A packed object is cut off, torn or altered, or its frames do not decode; the original must be loaded again."""
