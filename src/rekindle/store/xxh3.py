"""XXH3-64, by the xxhash library, which is imported when it is first needed: much of the store does without."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rekindle.errors import ConfigurationError

if TYPE_CHECKING:
    import xxhash

    from rekindle.store.safetensors_file import Bytes


def xxh3_64() -> xxhash.xxh3_64:
    """A checksum under way. Raises ConfigurationError if the library is not installed."""
    try:
        import xxhash
    except ImportError as error:
        raise ConfigurationError("checksums need the xxhash library; pip install 'rekindle[store]'") from error
    return xxhash.xxh3_64()


def xxh3_64_of(content: Bytes) -> int:
    """The checksum of `content`. Raises as `xxh3_64` does."""
    whole = xxh3_64()
    whole.update(content)
    return whole.intdigest()
