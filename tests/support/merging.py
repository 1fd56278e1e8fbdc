"""Engines whose policy merges what the test says, and adapters to merge."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rekindle.engine.merging import MergedCopies
from rekindle.engine.scheduler.merging import MergeState
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.units import MIB
from support.engines import LocalEngine, Output, greedy
from support.oracle import random_prompts
from support.policies import ToldPolicy
from support.tiny import make_adapter, make_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp-rank-1": {"r": 1, "lora_alpha": 1, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "all-rank-64": {"r": 64, "lora_alpha": 8, "target_modules": ALL_LINEAR},
    "just-small-enough": {"r": 8, "lora_alpha": 5, "target_modules": ALL_LINEAR},
    "some-layers": {"r": 6, "lora_alpha": 3, "target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]},
    "head": {"r": 4, "lora_alpha": 2, "target_modules": ["lm_head", "q_proj"]},
    "embedding": {"r": 4, "lora_alpha": 2, "target_modules": ["embed_tokens", "o_proj"]},
    "saved-head": {"r": 4, "lora_alpha": 2, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
}
"""Random updates about as large as they may be for merging."""
TIED = ("head", "embedding", "saved-head")
"""Adapters that PEFT does not make for a base whose head is its embedding."""
HUGE = {"r": 4, "lora_alpha": 400, "target_modules": ["q_proj"]}
BUDGET = 64 * MIB


class Served:
    """One tiny base with adapters, and PEFT's own model for each."""

    def __init__(self, directory: Path, name: str) -> None:
        self.base = make_model(name, directory / "source")
        self._directory, self._home = directory, Home(directory / "home")
        self.manifest = import_model(directory / "source", self._home)
        self.model_dir = self._home.model_directory(self.manifest.digest)
        self.oracles: dict[str | None, Any] = {None: self.base}
        self.manifests: dict[str, AdapterManifest] = {}
        configs = {**ADAPTERS, "huge": HUGE}
        if self.base.config.tie_word_embeddings:
            configs = {adapter: config for adapter, config in configs.items() if adapter not in TIED}
        for seed, (adapter, config) in enumerate(configs.items()):
            self.oracles[adapter] = make_adapter(self.base, directory / adapter, seed, **config)
            self.manifests[adapter] = import_adapter(directory / adapter, self.manifest, self.model_dir, self._home)

    def digest(self, name: str | None) -> AdapterDigest | None:
        return None if name is None else self.manifests[name].digest

    def directory_of(self, name: str) -> Path:
        return self._home.adapter_directory(self.manifests[name].digest)


class MergingEngine(LocalEngine):
    """An engine whose policy merges what the test says."""

    def __init__(self, served: Served, **changes: object) -> None:
        super().__init__(served.model_dir, served.manifest, **{"merge_bytes": BUDGET, **changes})
        self.served = served
        for name, manifest in served.manifests.items():
            self.add_adapter(served.directory_of(name), manifest)

    @property
    def policy(self) -> ToldPolicy:
        policy = self.engine._merge_policy
        assert isinstance(policy, ToldPolicy)
        return policy

    @property
    def copies(self) -> MergedCopies:
        copies = self.engine._merging
        assert isinstance(copies, MergedCopies)
        return copies

    def merge(self, name: str) -> MergeState:
        """Run requests of an adapter until there is news of its merged weights."""
        digest = self.policy.target = self.served.digest(name)
        first = len(self.policy.news)
        for i in range(100):
            key = f"warm-{name}-{first}-{i}"
            self.run([greedy(key, random_prompts(seed=1000 + i)[1], 8, digest)])
            for outcome in self.policy.news[first:]:
                if outcome.digest == digest:
                    return outcome.state
        raise AssertionError("the adapter is never merged")

    def load(self, names: Iterable[str | None]) -> None:
        """Bring adapters into memory, so that requests for them start in the same step."""
        for name in names:
            if name is not None:
                self.run([greedy(f"load-{name}-{len(self.outputs)}", [3, 4], 1, self.served.digest(name))])

    def ask(self, name: str | None, prompt: list[int], key: str) -> Output:
        """One request alone."""
        return self.run([greedy(key, prompt, 8, self.served.digest(name))])[key]
