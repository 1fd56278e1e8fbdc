"""The sequences that wait to be admitted, and whose turn it is.

Lower priority numbers go first, as in vLLM. Within a priority the flow that was served least goes first, and within a
flow the sequence that came first. Once the batch holds `MANY_ADAPTERS` different adapters, those that are in it go
before others (S-LoRA, section 4.1: fewer adapters a step, less to read), but no more than `CLUSTER_TOKENS` of service
and `CLUSTER_WAIT_S` seconds of waiting ahead of their turn.

Places in a full queue are shared among flows, too. A newcomer takes the place of the last sequence of the flow that
has most, if that is at least two more than its own flow has: the difference shrinks, and nobody can take the place
back. Of N places and k flows, the newcomer's included, whose sequences may all be displaced, no newcomer is turned away
whose flow holds fewer than N / k - 1, and nobody loses a place whose flow holds N / k or fewer. Sequences that have
run, those that were accepted before (resumed ones) and those more urgent than the newcomer are never displaced.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heapreplace

from rekindle.engine.scheduler.fairness import Flow, FlowCounters
from rekindle.engine.scheduler.sequence import Sequence, rank_of
from rekindle.protocol.identity import AdapterDigest

MANY_ADAPTERS = 8
"""S-LoRA's d; its figures (appendix, cluster size) are best at 8 and flat around it."""

TOKENS_PER_S_OF_AGE = 8.0
"""What a second of waiting since its last turn gains a flow, so that flows that come anew without end cannot keep one
waiting that was served before."""

CLUSTER_TOKENS = 512.0
CLUSTER_WAIT_S = 0.5

_FIRST_GUESS_S = 1.0
SHORTEST_WAIT_S = 0.1
LONGEST_WAIT_S = 60.0
_WEIGHT_OF_LATEST = 0.2


class WaitingQueue:
    """A queue that lets sequences leave from any place; one that comes back takes the place of its arrival."""

    def __init__(self, counters: FlowCounters) -> None:
        self._counters = counters
        self._flows: dict[Flow, list[Sequence]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, flow by flow."""
        for sequences in tuple(self._flows.values()):
            yield from tuple(sequences)

    def add(self, sequence: Sequence) -> None:
        insort(self._flows.setdefault(sequence.flow, []), sequence, key=rank_of)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; it must be in the queue."""
        sequences = self._flows[sequence.flow]
        del sequences[bisect_left(sequences, rank_of(sequence), key=rank_of)]
        self._num_waiting -= 1
        if not sequences:
            del self._flows[sequence.flow]

    def to_displace(self, newcomer: Sequence) -> Sequence | None:
        """Who gives up a place in a full queue for a newcomer; None if nobody does. Takes a look at every flow."""
        found, most = None, len(self._flows.get(newcomer.flow, ())) + 1
        for sequences in self._flows.values():
            if len(sequences) > most:
                last = _last_displaceable(sequences, newcomer.request.priority)
                if last is not None:
                    found, most = last, len(sequences)
        return found

    def in_turn(self, active: Collection[AdapterDigest], now_s: float) -> Iterator[Sequence]:
        """The sequences in the order of their turns, each once. `active` are the adapters in the batch. What a flow is
        charged, and adapters that become active, between two sequences of a flow count for the second."""
        turns = []
        for sequences in self._flows.values():
            rest = iter(tuple(sequences))
            first = next(rest)
            turns.append((self._key(first, active, now_s), first, rest))
        heapify(turns)
        while turns:
            _, sequence, rest = turns[0]
            yield sequence
            following = next(rest, None)
            if following is None:
                heappop(turns)
            else:
                heapreplace(turns, (self._key(following, active, now_s), following, rest))

    def _key(self, sequence: Sequence, active: Collection[AdapterDigest], now_s: float) -> tuple[int, float, int]:
        adapter = sequence.request.adapter
        turn = self._counters.served(sequence.flow)
        turn -= TOKENS_PER_S_OF_AGE * (now_s - max(sequence.waiting_since_s, self._counters.last_turn_s(sequence.flow)))
        is_apart = adapter is not None and adapter not in active and len(active) >= MANY_ADAPTERS
        if is_apart and now_s - sequence.waiting_since_s < CLUSTER_WAIT_S:
            turn += CLUSTER_TOKENS
        return sequence.request.priority, turn, sequence.arrival


def _last_displaceable(sequences: list[Sequence], priority: int) -> Sequence | None:
    """The last sequence of a flow that has not run, is not resumed and is no more urgent than `priority`."""
    for sequence in reversed(sequences):
        if sequence.request.priority < priority:
            return None
        if not sequence.was_charged and not sequence.request.epoch:
            return sequence
    return None


class DepartureRate:
    """How often a place becomes free: `mean_interval_s` is an exponentially weighted mean of the intervals."""

    def __init__(self) -> None:
        self.mean_interval_s = _FIRST_GUESS_S
        self._latest_s: float | None = None

    def note(self, num_departed: int, num_left: int, now_s: float) -> None:
        """At `now_s` sequences left the queue. Intervals count only while others are left to wait."""
        if num_departed and self._latest_s is not None:
            interval_s = (now_s - self._latest_s) / num_departed
            self.mean_interval_s += _WEIGHT_OF_LATEST * (interval_s - self.mean_interval_s)
        if num_departed or not num_left:
            self._latest_s = now_s if num_left else None

    def pause(self) -> None:
        """Nobody waits any more: the time until somebody does is no interval."""
        self._latest_s = None

    def expected_wait_s(self, now_s: float) -> float:
        """Seconds until a place is likely to be free, within sensible bounds; a queue that stands still counts."""
        since_latest_s = 0.0 if self._latest_s is None else now_s - self._latest_s
        return min(max(self.mean_interval_s, since_latest_s, SHORTEST_WAIT_S), LONGEST_WAIT_S)
