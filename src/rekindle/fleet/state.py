"""The states of a replica and the ways between them."""

from __future__ import annotations

from enum import Enum

from rekindle.errors import InternalError


class ReplicaState(Enum):
    """STARTING until the first engine is ready, RESTARTING after one has died until the next is. ASLEEP there is no
    engine until a request comes; then it is WAKING. Requests are taken in all of these, and wait. STOPPED is final."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPED = "stopped"


_NEXT_STATES = {
    ReplicaState.STARTING: {ReplicaState.READY, ReplicaState.STOPPED},
    ReplicaState.READY: {ReplicaState.RESTARTING, ReplicaState.ASLEEP, ReplicaState.STOPPED},
    ReplicaState.RESTARTING: {ReplicaState.READY, ReplicaState.STOPPED},
    ReplicaState.ASLEEP: {ReplicaState.WAKING, ReplicaState.STOPPED},
    ReplicaState.WAKING: {ReplicaState.READY, ReplicaState.RESTARTING, ReplicaState.STOPPED},
    ReplicaState.STOPPED: set(),
}


def check_transition(present: ReplicaState, following: ReplicaState) -> None:
    """Raise InternalError if no replica goes from the one state to the other."""
    if following not in _NEXT_STATES[present]:
        raise InternalError(f"a replica that is {present.value} cannot become {following.value}")
