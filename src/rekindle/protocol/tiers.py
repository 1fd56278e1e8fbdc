"""What is said to the process that owns a machine's host-memory tier. Descriptors of memory come with the messages."""

from __future__ import annotations

import msgspec

MAX_MESSAGE_BYTES = 1 << 16


class Attach(msgspec.Struct, frozen=True, tag=True):
    """A connection for another holder of leases comes with this; said by the owner of the process only."""


class Lease(msgspec.Struct, frozen=True, tag=True):
    """The object of this name is wanted. It stays where it is until the connection it was asked on ends."""

    name: str


class Publish(msgspec.Struct, frozen=True, tag=True):
    """An object was made, in the memory that comes with this, and is leased by who made it. Its elements are of
    `dtype`, as safetensors names it; making it again would take `made_s`."""

    name: str
    num_bytes: int
    dtype: str
    made_s: float


class AskSnapshot(msgspec.Struct, frozen=True, tag=True):
    """What is where?"""


class Leased(msgspec.Struct, frozen=True, tag=True):
    """The object's memory comes with this."""

    num_bytes: int


class Absent(msgspec.Struct, frozen=True, tag=True):
    """There is no object of that name."""


class Kept(msgspec.Struct, frozen=True, tag=True):
    """A published object is there for others. False: one of that name was there already."""

    is_first: bool


class Resident(msgspec.Struct, frozen=True):
    """An object in memory, where it takes `kept_bytes` of its `num_bytes` if it is packed; `idle_s` is how long nobody
    has leased it, 0 while somebody does. `reasons` say why it is packed, or is not to be, once that was considered."""

    name: str
    num_bytes: int
    kept_bytes: int
    num_leases: int
    idle_s: float
    is_packed: bool = False
    reasons: tuple[str, ...] = ()


class Snapshot(msgspec.Struct, frozen=True, tag=True):
    """`idle_bytes` of objects that nobody leases are kept; what exceeds `budget_bytes` is being packed or goes. Objects
    in use are their users'."""

    budget_bytes: int
    idle_bytes: int
    objects: tuple[Resident, ...]
    hits_total: int
    misses_total: int
    evictions_total: int
    packs_total: int = 0
    unpacks_total: int = 0


class SnapshotTaken(msgspec.Struct, frozen=True, tag=True):
    """A `Snapshot`, as msgpack, is in the anonymous file that comes with this: of many objects it is longer than a
    message may be."""

    num_bytes: int


Request = Attach | Lease | Publish | AskSnapshot
Reply = Leased | Absent | Kept | SnapshotTaken
