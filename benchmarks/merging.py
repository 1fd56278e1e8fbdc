"""Tokens a second with an adapter never merged, always merged and merged when the policy says so:
`python benchmarks/merging.py [--concurrency 8 32] [--repetitions 5]`.

A closed loop of C random requests on the demo model, prompts of 32 tokens and 32 new ones. Of each mix, a share of the
requests is for one adapter, the others are for the base and seven more, evenly. Adapters have rank 16. `base` runs the
same requests without adapters. The modes take turns in one process, on requests of the same lengths and adapters, so
that what disturbs the machine disturbs all; figures are medians. `auto/best` is the median over the rounds of the
policy's speed as a part of the better of never and always in that round. `first auto` is its first run, in which it
has to notice and to write the copy.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine import GGUF
from rekindle.bench.random_adapters import ALL_LINEAR, ATTENTION, write_random_adapter
from rekindle.clock import Clock, SystemClock
from rekindle.engine import engine as engine_module
from rekindle.engine.engine import Engine
from rekindle.engine.scheduler.merging import MergeChoice, MergePolicy, StepMix
from rekindle.protocol.adapters import ADAPTER_FILE_NAME
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.units import GIB, MIB

PROMPT_TOKENS, NEW_TOKENS = 32, 32
MIN_REQUESTS = 24
NUM_ADAPTERS = 32
MIXES: dict[str, float | None] = {"100%": 1.0, "95%": 0.95, "60%": 0.6, "uniform 32": None}
MODES = ("base", "never", "always", "auto")


class CpuClock(SystemClock):
    """Seconds of computing. With one thread they pass as on a machine that has nothing else to do."""

    def monotonic_s(self) -> float:
        return time.process_time()


class SwitchedPolicy(MergePolicy):
    """The policy, unless `mode` overrules it: "always" merges `target` in every step that has rows of it."""

    mode = "never"
    target = AdapterDigest("")

    def choose(self, mix: StepMix, now_s: float) -> MergeChoice:
        if self.mode == "auto":
            return super().choose(mix, now_s)
        self.merged = self.target if self.mode == "always" and self.target in mix.rows_of else None
        self.num_merged_steps += self.merged is not None
        return MergeChoice(self.merged, self.target if self.merged and self.target not in self._ready else None)

    def restart(self) -> None:
        """Forget what was learned, as if the engine had just started."""
        sizes = self._sizes
        self.__init__(self._write_s_per_byte)  # type: ignore[misc]
        self._sizes = sizes


class Bench:
    """An engine with the demo model and random adapters, the first of which may be merged."""

    def __init__(self, directory: Path, targets: Sequence[str], threads: int, clock: Clock) -> None:
        self._clock = clock
        home = Home(directory / "home")
        model = import_model(GGUF, home)
        model_dir = home.model_directory(model.digest)
        settings = EngineSettings(str(model_dir), model, "bfloat16", 2 * GIB, 16, 512, 256, 1024, threads)
        self.engine = Engine(replace(settings, merge_bytes=512 * MIB), clock, lambda: None)
        policy = self.engine._merge_policy
        assert isinstance(policy, SwitchedPolicy)
        self.policy = policy
        self._adapters: list[AdapterDigest] = []
        self._num_runs = 0
        for i in range(NUM_ADAPTERS):
            source = directory / f"adapter-{i}"
            write_random_adapter(source, model, 16, targets, seed=i)
            manifest = import_adapter(source, model, model_dir, home)
            self.engine.add_adapter(manifest, str(home.adapter_directory(manifest.digest) / ADAPTER_FILE_NAME))
            self._adapters.append(manifest.digest)
        policy.target = self._adapters[0]

    def run(self, mode: str, share: float | None, concurrency: int, seed: int) -> tuple[float, float]:
        """Tokens a second and the share of merged steps."""
        self.policy.mode = mode
        draw = random.Random(seed)
        adapters = [self._draw(draw, share) for _ in range(max(2 * concurrency, MIN_REQUESTS))]
        prompts = random.Random(self._num_runs)
        self._num_runs += 1
        before = self.engine.stats()
        num_open = num_started = num_tokens = 0
        started_s = self._clock.monotonic_s()
        while num_started < len(adapters) or num_open:
            while num_open < concurrency and num_started < len(adapters):
                adapter = None if mode == "base" else adapters[num_started]
                self.engine.submit(_request(f"{self._num_runs}-{num_started}", prompts, adapter))
                num_started += 1
                num_open += 1
            for chunk in self.engine.step():
                num_tokens += len(chunk.token_ids)
                num_open -= chunk.finish_reason is not None
        took_s = self._clock.monotonic_s() - started_s
        after = self.engine.stats()
        num_merged = after.steps_merged_total - before.steps_merged_total
        return num_tokens / took_s, num_merged / (after.steps_total - before.steps_total)

    def forget(self) -> None:
        """Drop all copies and all that was learned."""
        merging = self.engine._merging
        assert merging is not None
        for adapter in self._adapters:
            merging.forget(adapter)
        self.policy.restart()

    def prepare(self) -> None:
        """Have the copy that "always" needs."""
        while self.policy.target not in self.policy._ready:
            self.run("always", 1.0, 8, seed=0)

    def _draw(self, draw: random.Random, share: float | None) -> AdapterDigest | None:
        if share is None:
            return draw.choice(self._adapters)
        if draw.random() < share:
            return self._adapters[0]
        return draw.choice([None, *self._adapters[1:8]])


def main() -> None:
    """Measure all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--mixes", choices=MIXES, nargs="+", default=list(MIXES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--targets", choices=("attention", "all-linear"), default="all-linear")
    parser.add_argument("--cpu-seconds", action="store_true", help="count seconds of computing, with one thread")
    arguments = parser.parse_args()
    vars(engine_module)["MergePolicy"] = SwitchedPolicy
    targets = ATTENTION if arguments.targets == "attention" else ALL_LINEAR
    with tempfile.TemporaryDirectory() as directory:
        threads, clock = (1, CpuClock()) if arguments.cpu_seconds else (arguments.threads, SystemClock())
        bench = Bench(Path(directory), targets, threads, clock)
        print("  C  mix         " + "".join(f"{mode:>9}" for mode in MODES) + "  first auto  merged steps  auto/best")
        for concurrency in arguments.concurrency:
            for mix in arguments.mixes:
                print(_line(bench, mix, MIXES[mix], concurrency, arguments.repetitions), flush=True)
        bench.engine.close()


def _line(bench: Bench, mix: str, share: float | None, concurrency: int, repetitions: int) -> str:
    bench.forget()
    bench.run("base", share, concurrency, seed=0)
    first, _ = bench.run("auto", share, concurrency, seed=0)
    bench.prepare()
    speeds: dict[str, list[float]] = {mode: [] for mode in MODES}
    merged: list[float] = []
    for repetition in range(repetitions):
        for mode in MODES[repetition % len(MODES) :] + MODES[: repetition % len(MODES)]:
            speed, merged_share = bench.run(mode, share, concurrency, seed=repetition)
            speeds[mode].append(speed)
            merged += [merged_share] * (mode == "auto")
    best = [speeds["auto"][i] / max(speeds["never"][i], speeds["always"][i]) for i in range(repetitions)]
    medians = "".join(f"{statistics.median(speeds[mode]):9.0f}" for mode in MODES)
    return (
        f"{concurrency:3d}  {mix:<12}{medians}  {first:10.0f}  {statistics.median(merged):12.2f}"
        f"  {statistics.median(best):9.2f}"
    )


def _request(name: str, draw: random.Random, adapter: AdapterDigest | None) -> GenerateRequest:
    prompt = tuple(draw.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS))
    return GenerateRequest(
        RequestId(name), prompt, SamplingParams(NEW_TOKENS, seed=0, temperature=0.0), adapter=adapter
    )


if __name__ == "__main__":
    main()
