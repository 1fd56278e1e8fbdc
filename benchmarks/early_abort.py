"""What early abort is worth under bursts: `python benchmarks/early_abort.py`.

The engine's own scheduler in virtual time, with steps that take 6 ms, 1.3 ms for each prompt token and 0.9 ms for each
decoding sequence (the demo model on two cores). Requests arrive in gamma intervals of coefficient of variation cv, with
prompts and outputs of 8 to 256 tokens, spread over 200 adapters, at a rate a little above what the replica can serve,
for 300 s; the service-level objective is a first token within 6 s (S-LoRA, section 7.1 and its table of early abort).

FCFS serves all as one flow, `turns` in turns by adapter, `early abort` in turns and with the objective in each request.
`attained` is the share of all requests that had their first token in time; `mean TTFT` is that of the requests served.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import deque
from dataclasses import dataclass

from rekindle.engine.scheduler.plan import SequenceResult, StepPlan, StepResult
from rekindle.engine.scheduler.scheduler import Scheduler, SchedulerConfig
from rekindle.protocol.adapters import ADAPTER_LAYOUT, AdapterManifest
from rekindle.protocol.generation import FinishReason, GenerateRequest
from rekindle.protocol.identity import AdapterDigest, ModelDigest, RequestId
from rekindle.protocol.sampling import SamplingParams

SLO_S, DURATION_S = 6.0, 300.0
NUM_ADAPTERS = 200
MIN_TOKENS, MAX_TOKENS = 8, 256
STEP_S, PROMPT_TOKEN_S, DECODE_S = 0.006, 0.0013, 0.0009
BASE = ModelDigest("base")


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: how many requests came, and the seconds to the first token of those that were served."""

    num_requests: int
    ttft_s: list[float]

    @property
    def attained(self) -> float:
        return sum(seconds <= SLO_S for seconds in self.ttft_s) / self.num_requests


def main() -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cv", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--rate", type=float, default=3.6, help="requests a second")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    print("  cv  policy       requests  served  attained  mean TTFT s")
    for cv in arguments.cv:
        for policy in ("FCFS", "turns", "early abort"):
            runs = [simulate(arguments.rate, cv, policy, seed) for seed in range(arguments.seeds)]
            num_requests = sum(run.num_requests for run in runs)
            served = sum(len(run.ttft_s) for run in runs) / num_requests
            attained = statistics.mean(run.attained for run in runs)
            ttft_s = statistics.mean(seconds for run in runs for seconds in run.ttft_s)
            print(
                f"{cv:4g}  {policy:11}  {num_requests:8d}  {served:6.2f}  {attained:8.2f}  {ttft_s:11.2f}", flush=True
            )


def simulate(rate: float, cv: float, policy: str, seed: int) -> Outcome:
    """Serve one trace in virtual time."""
    chance = random.Random(seed)
    scheduler = _make_scheduler()
    arrivals = deque(_arrivals(chance, rate, cv, policy))
    num_requests = len(arrivals)
    arrived_s: dict[RequestId, float] = {}
    ttft_s: dict[RequestId, float] = {}
    now_s = 0.0
    while arrivals or scheduler.has_work:
        if not scheduler.has_work:
            now_s = max(now_s, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now_s:
            due_s, request = arrivals.popleft()
            arrived_s[request.request_id] = due_s
            scheduler.submit(request, now_s)
        refused = scheduler.refuse_late(now_s)
        plan = scheduler.schedule(now_s)
        for load in plan.loads:
            scheduler.adapter_loaded(load.manifest.digest, now_s)
        now_s += (duration_s := _duration_s(plan))
        results = (SequenceResult((1,) if it.samples else (), it.num_positions) for it in plan.sequences)
        chunks = scheduler.commit(plan, StepResult(plan.step, tuple(results)))
        scheduler.note_duration(plan, duration_s)
        for chunk in (*refused, *chunks):
            if chunk.finish_reason is not FinishReason.ERROR and chunk.token_ids:
                ttft_s.setdefault(chunk.request_id, now_s - arrived_s[chunk.request_id])
    return Outcome(num_requests, list(ttft_s.values()))


def _make_scheduler() -> Scheduler:
    config = SchedulerConfig(
        base=BASE,
        num_pages=20_000,
        page_tokens=16,
        page_bytes=1 << 19,
        token_bytes=1 << 15,
        element_bytes=2,
        max_step_tokens=512,
        max_sequences=64,
        max_queued=1 << 20,
        max_context_tokens=8192,
    )
    scheduler = Scheduler(config)
    for i in range(NUM_ADAPTERS):
        digest = AdapterDigest(f"adapter-{i}")
        scheduler.add_adapter(
            AdapterManifest(digest, BASE, "BF16", 1 << 21, (16,), ("q_proj",), (), layout=ADAPTER_LAYOUT)
        )
    return scheduler


def _arrivals(chance: random.Random, rate: float, cv: float, policy: str) -> list[tuple[float, GenerateRequest]]:
    slo_s = SLO_S if policy == "early abort" else None
    found: list[tuple[float, GenerateRequest]] = []
    now_s = 0.0
    while (now_s := now_s + chance.gammavariate(1 / cv**2, cv**2 / rate)) < DURATION_S:
        name = RequestId(f"r{len(found)}")
        prompt = tuple(chance.randrange(1 << 30) for _ in range(chance.randint(MIN_TOKENS, MAX_TOKENS)))
        sampling = SamplingParams(max_tokens=chance.randint(MIN_TOKENS, MAX_TOKENS), seed=0)
        number = chance.randrange(NUM_ADAPTERS)
        adapter = None if policy == "FCFS" else AdapterDigest(f"adapter-{number}")
        found.append((now_s, GenerateRequest(name, prompt, sampling, adapter=adapter, ttft_slo_s=slo_s)))
    return found


def _duration_s(plan: StepPlan) -> float:
    if not plan.sequences:
        return STEP_S
    num_decodes = sum(planned.num_positions == 1 for planned in plan.sequences)
    return STEP_S + PROMPT_TOKEN_S * (plan.num_tokens - num_decodes) + DECODE_S * num_decodes


if __name__ == "__main__":
    main()
