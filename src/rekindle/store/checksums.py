"""Checksums of the chunks of a stored file, kept beside it and compared while it is read.

The index of FILE is FILE.xxh3: little-endian 64-bit words, namely a magic word, the chunk size, the file's length, the
XXH3-64 of each chunk in order (the last may be shorter), and the XXH3-64 of all words before. It is worked out from the
bytes that are handed to the filesystem, so that it also tells what never reached the disk. It guards against accidents,
not against people; content is known by its SHA-256.

Files that were imported before there were indexes have none and are read unverified.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.errors import StoredFileDamaged
from rekindle.store.safetensors_file import Bytes, TensorStream, encode_header, write_tensors
from rekindle.store.xxh3 import xxh3_64, xxh3_64_of
from rekindle.units import MIB

CHUNK_BYTES = 4 * MIB
"""Of files written now. At 20 GB/s a chunk takes a tenth of the time that a disk of 2 GB/s needs to deliver it."""

_MAGIC = int.from_bytes(b"RkXXH3\x00\x01", "little")
_WORD_BYTES = 8


@dataclass(frozen=True, slots=True)
class Checksums:
    """What each chunk of the file `name` must hash to."""

    name: str
    chunk_bytes: int
    file_bytes: int
    digests: tuple[int, ...]

    def verify(self, offset: int, chunk: memoryview) -> None:
        """Compare the whole chunk that begins at `offset`.

        Raises:
            StoredFileDamaged: it differs.
        """
        self.compare(offset // self.chunk_bytes, xxh3_64_of(chunk))

    def compare(self, index: int, digest: int) -> None:
        """Raise StoredFileDamaged unless the chunk of that index hashes to `digest`."""
        if index >= len(self.digests) or digest != self.digests[index]:
            begin = index * self.chunk_bytes
            raise StoredFileDamaged(
                f"{self.name} is damaged: its bytes {begin} to {min(begin + self.chunk_bytes, self.file_bytes)} are "
                "not those that were imported; check the disk, remove the entry and import it again"
            )

    def encode(self) -> bytes:
        """The index file's content."""
        words = (_MAGIC, self.chunk_bytes, self.file_bytes, *self.digests)
        raw = struct.pack(f"<{len(words)}Q", *words)
        return raw + struct.pack("<Q", xxh3_64_of(raw))


class _ChunkDigests:
    """The checksum of each chunk of a file whose bytes come in order, in pieces of any size."""

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes, self._file_bytes = chunk_bytes, 0
        self._current = xxh3_64()

    def update(self, piece: Bytes) -> list[int]:
        """Take the next bytes of the file; returns the checksums of the chunks that they complete."""
        digests = []
        view = memoryview(piece)
        left = view.cast("B") if view.nbytes else b""
        while left:
            room = self._chunk_bytes - self._file_bytes % self._chunk_bytes
            part, left = left[:room], left[room:]
            self._current.update(part)
            self._file_bytes += len(part)
            if len(part) == room:
                digests.append(self._current.intdigest())
                self._current.reset()
        return digests

    def finish(self) -> tuple[int, list[int]]:
        """The file's length, and the checksum of its last chunk unless it was complete."""
        return self._file_bytes, [self._current.intdigest()] if self._file_bytes % self._chunk_bytes else []


class ChecksumBuilder:
    """Makes the checksums of a file from its bytes, which come in order, in pieces of any size."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes, self._chunks, self._digests = chunk_bytes, _ChunkDigests(chunk_bytes), list[int]()

    def update(self, piece: Bytes) -> None:
        """Take the next bytes of the file."""
        self._digests += self._chunks.update(piece)

    def finish(self, name: str) -> Checksums:
        """The checksums of all that was taken."""
        file_bytes, last = self._chunks.finish()
        return Checksums(name, self._chunk_bytes, file_bytes, (*self._digests, *last))


class ChecksumFollower:
    """Compares a file's bytes with its checksums while they come, in order, in pieces of any size.

    Both methods raise StoredFileDamaged as soon as a chunk differs.
    """

    def __init__(self, checksums: Checksums) -> None:
        self._checksums, self._chunks, self._num_compared = checksums, _ChunkDigests(checksums.chunk_bytes), 0

    def update(self, piece: Bytes) -> None:
        """Take the next bytes of the file."""
        self._compare(self._chunks.update(piece))

    def finish(self) -> None:
        """The file has ended."""
        file_bytes, last = self._chunks.finish()
        self._compare(last)
        if file_bytes != self._checksums.file_bytes:
            raise StoredFileDamaged(
                f"{self._checksums.name} has {file_bytes} bytes, its checksums are of {self._checksums.file_bytes}: it "
                "is torn or was replaced; import it again"
            )

    def _compare(self, digests: Sequence[int]) -> None:
        for digest in digests:
            self._checksums.compare(self._num_compared, digest)
            self._num_compared += 1


def write_checked_tensors(
    path: Path,
    tensors: Sequence[TensorStream],
    *,
    metadata: Mapping[str, str] | None = None,
    observe: Callable[[Bytes], None],
) -> None:
    """`write_tensors`, and the file's checksums beside it."""
    builder = ChecksumBuilder()
    builder.update(encode_header(tensors, metadata))

    def observe_both(piece: Bytes) -> None:
        builder.update(piece)
        observe(piece)

    write_tensors(path, tensors, metadata=metadata, observe=observe_both)
    checksums_path(path).write_bytes(builder.finish(path.name).encode())


def checksums_path(path: Path) -> Path:
    """Where the checksums of the file at `path` lie."""
    return path.with_name(f"{path.name}.xxh3")


def read_checksums(path: Path) -> Checksums | None:
    """The checksums of the file at `path`; None if it was imported before they were kept.

    Raises:
        StoredFileDamaged: the index is not one that was written whole.
        OSError: it cannot be read.
    """
    index = checksums_path(path)
    try:
        raw = index.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return _parse(path.name, raw)
    except ValueError as error:
        raise StoredFileDamaged(f"{index} is damaged: {error}; remove the entry and import it again") from error


def _parse(name: str, raw: bytes) -> Checksums:
    if len(raw) % _WORD_BYTES or len(raw) < 4 * _WORD_BYTES:
        raise ValueError(f"it has {len(raw)} bytes, which no index has")
    magic, chunk_bytes, file_bytes, *digests, own = struct.unpack(f"<{len(raw) // _WORD_BYTES}Q", raw)
    if magic != _MAGIC:
        raise ValueError(f"it begins with {raw[:_WORD_BYTES].hex()}, not with the mark of an index of this version")
    if own != xxh3_64_of(raw[:-_WORD_BYTES]):
        raise ValueError("its own checksum does not match")
    if chunk_bytes < 1 or len(digests) != -(-file_bytes // chunk_bytes):
        raise ValueError(f"it has {len(digests)} checksums for {file_bytes} bytes in chunks of {chunk_bytes}")
    return Checksums(name, chunk_bytes, file_bytes, tuple(digests))
