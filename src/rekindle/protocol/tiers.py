"""What is said to the process that owns a machine's host-memory tier. Descriptors of memory come with the messages."""

from __future__ import annotations

import msgspec

MAX_MESSAGE_BYTES = 1 << 16


class Attach(msgspec.Struct, frozen=True, tag=True):
    """A connection for another holder of leases comes with this; said by the owner of the process only."""


class Lease(msgspec.Struct, frozen=True, tag=True):
    """The object of this name is wanted, as it is if `takes_packed`. It stays where it is until `Release`, or until the
    connection it was asked on ends."""

    name: str
    takes_packed: bool = False


class Publish(msgspec.Struct, frozen=True, tag=True):
    """An object was made, in the memory that comes with this, and is leased by who made it. Its elements are of
    `dtype`, as safetensors names it; making it again would take `made_s`."""

    name: str
    num_bytes: int
    dtype: str
    made_s: float


class Hold(msgspec.Struct, frozen=True, tag=True):
    """The sender has an object in memory of its own, where reading it from the file at `path` took `made_s`. From when
    nobody holds it any more, host memory may keep it. A lease without an answer.

    The object is the last `num_bytes` bytes of the file, with elements of `dtype`.
    """

    name: str
    num_bytes: int
    dtype: str
    made_s: float
    path: str


class Release(msgspec.Struct, frozen=True, tag=True):
    """One lease of the sender on this object ends; what it was given turned out to be damaged, if that is said. Without
    an answer."""

    name: str
    is_damaged: bool = False


class AskSnapshot(msgspec.Struct, frozen=True, tag=True):
    """What is where?"""


class Leased(msgspec.Struct, frozen=True, tag=True):
    """The object's memory comes with this: an anonymous file of `kept_bytes`, packed or as it is."""

    kept_bytes: int
    is_packed: bool = False


class Absent(msgspec.Struct, frozen=True, tag=True):
    """There is no object of that name."""


class Kept(msgspec.Struct, frozen=True, tag=True):
    """A published object is there for others. False: one of that name was there already."""

    is_first: bool


class Resident(msgspec.Struct, frozen=True):
    """An object of `num_bytes`, of which host memory has `kept_bytes`: fewer if it is packed, none if it is only in the
    memory of those who hold it (`is_elsewhere`) or in its file. `idle_s` is how long nobody has leased it, 0 while
    somebody does. `reasons` say why it is packed, or is not to be, once that was considered."""

    name: str
    num_bytes: int
    kept_bytes: int
    num_leases: int
    idle_s: float
    is_packed: bool = False
    reasons: tuple[str, ...] = ()
    is_elsewhere: bool = False

    @property
    def is_in_use(self) -> bool:
        """Whether its bytes here are those that somebody works with."""
        return bool(self.num_leases) and not self.is_elsewhere


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """`idle_bytes` are kept of objects that nobody leases, or whose users have them in memory of their own; what
    exceeds `budget_bytes` is being packed or goes. Bytes in use are their users'."""

    budget_bytes: int
    idle_bytes: int
    objects: tuple[Resident, ...]
    hits_total: int
    misses_total: int
    evictions_total: int
    packs_total: int = 0
    unpacks_total: int = 0
    reads_total: int = 0


class SnapshotTaken(msgspec.Struct, frozen=True, tag=True):
    """A `Snapshot`, as msgpack, is in the anonymous file that comes with this: of many objects it is longer than a
    message may be."""

    num_bytes: int


Request = Attach | Lease | Publish | Hold | Release | AskSnapshot
Reply = Leased | Absent | Kept | SnapshotTaken
