"""Shares of a replica: virtual token counters over flows (Sheng et al., "Fairness in Serving Large Language Models",
OSDI 2024, section 4).

A flow is one tenant's use of one adapter, or of the base alone. Its counter holds the tokens it was served, divided by
its weight; of the flows that wait, the one with the least goes first. A flow that was idle starts no lower than the
least of those that are active, so that nobody saves up turns. Two flows that both wait all the time are never served
tokens that differ by more than the largest request and the largest batch; see the paper's theorem 4.4.

What others, at whatever load, can cost a single request: let its flow be new, or have been served no more than the
least of the F flows that wait when it comes, all of one priority. At most one sequence of each of them is admitted
before it, since that one's tokens and turn put its flow behind. It is therefore planned within

    (F // B + 1) * O + ceil((B + F) * P / (C - B)) + 1 steps

for B = max_sequences, C = max_step_tokens > B, prompts of at most P tokens and outputs of at most O: until then the B
sequences that ran when it came, and the F, are all that run. A step either spends C - B tokens or more on their
prompts, of which there are (B + F) * P, or has tokens to spare; then every place is taken and each sequence gains a
token, and of B places one has seen no more than F // B of these sequences end. With one other flow, however busy, and
two places or more that is the length of one output and the time of the prompts. This supposes pages for a full batch.
To it come the load of its adapter, if that is absent and takes longer, and with `MANY_ADAPTERS` others in the batch the
bounds of clustering (see `waiting`); times the longest step, the steps are seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import AdapterDigest

PROMPT_TOKEN_COST = 1.0
OUTPUT_TOKEN_COST = 2.0
"""What tokens count, as in the paper: an output token takes a step of its own, prompt tokens share one."""

_FEW_FLOWS = 64


class Flow(NamedTuple):
    """Whom a sequence is served for."""

    tenant: str
    adapter: AdapterDigest | None

    @classmethod
    def of(cls, request: GenerateRequest) -> Flow:
        return cls(request.tenant, request.adapter)


@dataclass(slots=True)
class _Account:
    served: float = 0.0
    num_unfinished: int = 0
    last_turn_s: float = -math.inf


class FlowCounters:
    """The counter of each flow. Memory holds active flows, and idle ones that are ahead of them; a replica that is idle
    altogether starts anew."""

    def __init__(self) -> None:
        self._accounts: dict[Flow, _Account] = {}
        self._num_active = 0

    def __len__(self) -> int:
        return len(self._accounts)

    def served(self, flow: Flow) -> float:
        """Weighted tokens that count against a flow with unfinished sequences."""
        return self._accounts[flow].served

    def last_turn_s(self, flow: Flow) -> float:
        """When a sequence of the flow was last admitted; minus infinity if none was."""
        return self._accounts[flow].last_turn_s

    def note_turn(self, flow: Flow, now_s: float) -> None:
        """A sequence of the flow is admitted."""
        self._accounts[flow].last_turn_s = now_s

    def begin(self, flow: Flow) -> None:
        """A sequence of the flow has arrived."""
        account = self._accounts.setdefault(flow, _Account())
        if account.num_unfinished == 0:
            account.served = max(account.served, self._least_active())
            self._num_active += 1
        account.num_unfinished += 1

    def end(self, flow: Flow) -> None:
        """A sequence of the flow has ended."""
        account = self._accounts[flow]
        account.num_unfinished -= 1
        if account.num_unfinished == 0:
            self._num_active -= 1
            if len(self._accounts) >= 2 * self._num_active + _FEW_FLOWS or not self._num_active:
                self._forget_idle()

    def charge(self, flow: Flow, cost: float, weight: float) -> None:
        """Count `cost` tokens, served to a flow that may have `weight` times the share of others."""
        self._accounts[flow].served += cost / weight

    def _least_active(self) -> float:
        return min((account.served for account in self._accounts.values() if account.num_unfinished), default=0.0)

    def _forget_idle(self) -> None:
        """What an idle flow is behind by it would not get back; only what it is ahead by has to be remembered."""
        floor = self._least_active() if self._num_active else math.inf
        self._accounts = {
            flow: account
            for flow, account in self._accounts.items()
            if account.num_unfinished or account.served > floor
        }
