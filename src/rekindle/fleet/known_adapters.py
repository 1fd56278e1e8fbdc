"""The adapter versions a replica's engine shall know, and what it has yet to be told of them. Pure bookkeeping.

A version that is removed while requests use it is kept until the last of them ends, so that they can go on with another
engine should this one die.
"""

from __future__ import annotations

from collections import Counter

from rekindle.errors import NotFound
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest
from rekindle.protocol.replica import AddAdapter, RemoveAdapter


class KnownAdapters:
    """See the module."""

    def __init__(self) -> None:
        self._versions: dict[AdapterDigest, AddAdapter] = {}
        self._retired: set[AdapterDigest] = set()
        self._num_users: Counter[AdapterDigest] = Counter()
        self._told: dict[AdapterDigest, AddAdapter] = {}
        self._untold: dict[AdapterDigest, None] = {}

    def add(self, manifest: AdapterManifest, path: str) -> None:
        """Make a version known, or known again; repeating it is harmless."""
        message = AddAdapter(manifest, path)
        self._retired.discard(manifest.digest)
        self._versions[manifest.digest] = message
        self._untold[manifest.digest] = None

    def remove(self, digest: AdapterDigest) -> None:
        """Refuse a version to new requests, and forget it once it is unused; unknown ones are ignored."""
        if digest in self._versions:
            self._retired.add(digest)
            self._forget_if_unused(digest)

    def acquire(self, digest: AdapterDigest) -> None:
        """Count a request that uses a version.

        Raises:
            NotFound: the version is unknown or removed.
        """
        if digest not in self._versions or digest in self._retired:
            state = "removed" if digest in self._versions else "unknown here"
            raise NotFound(
                f"adapter version {digest} is {state}; register it, or ask for one that is served",
                field="model",
                code="model_not_found",
            )
        self._num_users[digest] += 1

    def release(self, digest: AdapterDigest) -> None:
        """A request that used a version has ended."""
        self._num_users[digest] -= 1
        self._forget_if_unused(digest)

    def engine_lost(self) -> None:
        """The next engine has to be told everything."""
        self._told.clear()
        self._untold = dict.fromkeys(self._versions)

    def take_next(self) -> AddAdapter | RemoveAdapter | None:
        """What to tell the engine next, from here on taken as told; None if it knows what it should."""
        while self._untold:
            digest = next(iter(self._untold))
            del self._untold[digest]
            version, told = self._versions.get(digest), self._told.get(digest)
            if version is not None and version != told:
                self._told[digest] = version
                return version
            if version is None and told is not None:
                del self._told[digest]
                return RemoveAdapter(digest)
        return None

    def _forget_if_unused(self, digest: AdapterDigest) -> None:
        if not self._num_users[digest]:
            del self._num_users[digest]
            if digest in self._retired:
                self._retired.discard(digest)
                del self._versions[digest]
                self._untold[digest] = None
