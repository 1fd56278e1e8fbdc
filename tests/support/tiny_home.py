"""A tiny model in a home of its own, PEFT adapters of it, and what each says by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.engines import LocalEngine
from support.oracle import oracle_greedy
from support.tiny import make_adapter, make_model

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class TinyAdapter:
    """An imported adapter. `source` is PEFT's directory, `stored` the home's."""

    source: Path
    stored: Path
    manifest: AdapterManifest

    @property
    def digest(self) -> AdapterDigest:
        return self.manifest.digest

    @property
    def num_bytes(self) -> int:
        """Bytes in an engine that computes in float32."""
        return 4 * self.manifest.num_elements


class TinyHome:
    """Adapters are made on demand by `adapter` and known by their names; None is the base."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.source = directory / "source"
        self.home = Home(directory / "home")
        self._oracles: dict[str | None, Any] = {None: make_model("llama", self.source)}
        self.manifest = import_model(self.source, self.home)
        self.model_dir = self.home.model_directory(self.manifest.digest)
        self._adapters: dict[str, TinyAdapter] = {}
        self._answers: dict[tuple[str | None, tuple[int, ...]], list[int]] = {}

    def adapter(self, name: str, rank: int = 8, targets: list[str] = ALL_LINEAR) -> TinyAdapter:
        """The adapter of that name, made with random weights of its own at the first call."""
        if name not in self._adapters:
            source = self._directory / name
            self._oracles[name] = make_adapter(
                self._oracles[None], source, len(self._adapters), r=rank, lora_alpha=2 * rank, target_modules=targets
            )
            manifest = import_adapter(source, self.manifest, self.model_dir, self.home)
            self._adapters[name] = TinyAdapter(source, self.home.adapter_directory(manifest.digest), manifest)
        return self._adapters[name]

    def engine(self, *names: str, **settings: object) -> LocalEngine:
        """An engine in this process that knows the adapters of these names."""
        engine = LocalEngine(self.model_dir, self.manifest, **settings)
        for name in names:
            self.register(engine, name)
        return engine

    def register(self, engine: LocalEngine, name: str) -> AdapterDigest:
        """Make an adapter known to an engine."""
        adapter = self.adapter(name)
        return engine.add_adapter(adapter.stored, adapter.manifest)

    def answer(self, name: str | None, prompt: list[int], num_tokens: int) -> list[int]:
        """The first tokens that transformers and PEFT say greedily, computed without any cache."""
        key = (name, tuple(prompt))
        if len(self._answers.get(key, ())) < num_tokens:
            self._answers[key] = oracle_greedy(self._oracles[name], prompt, num_tokens)
        return self._answers[key][:num_tokens]
