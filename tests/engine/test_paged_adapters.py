"""What GPUs use for memory, on a tensor of the CPU: adapters stay in scattered pages, and text is unchanged."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.engine import gpu_memory
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.devices import PagedDevice
from support.engines import LocalEngine, greedy
from support.oracle import oracle_greedy, random_prompts
from support.tiny import make_adapter, make_model

pytest.importorskip("peft")

ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 48, "target_modules": "all-linear"},
    "odd-rank": {"r": 3, "target_modules": ["q_proj", "v_proj", "lm_head"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
    "saved-head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-embedding": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


class Served:
    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.base = make_model("llama", directory / "source")
        self.home = Home(directory / "home")
        self.manifest = import_model(directory / "source", self.home)
        self.model_dir = self.home.model_directory(self.manifest.digest)
        self.engine = LocalEngine(self.model_dir, self.manifest, device=PagedDevice())
        self.oracles: dict[str, Any] = {}
        self.digests: dict[str, AdapterDigest] = {}
        for seed, (name, config) in enumerate(ADAPTERS.items()):
            self.oracles[name] = make_adapter(self.base, directory / name, seed, **config)
            manifest = import_adapter(directory / name, self.manifest, self.model_dir, self.home)
            self.digests[name] = self.engine.add_adapter(self.home.adapter_directory(manifest.digest), manifest)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(gpu_memory, "_STAGED_BYTES", 12_288)
    served = Served(tmp_path, torch.float32)
    yield served
    served.engine.close()


def test_adapters_in_scattered_pages_equal_peft(served: Served) -> None:
    prompt = random_prompts()[2]
    churn = [greedy(f"churn-{i}", random_prompts(i)[2], 3, digest) for i, digest in enumerate(served.digests.values())]
    served.engine.run(churn)
    requests = [greedy(name, prompt, 10, digest) for name, digest in served.digests.items()]
    outputs = served.engine.run([*requests, greedy("base", prompt, 10)])
    for name, oracle in {**served.oracles, "base": served.base}.items():
        assert outputs[name].token_ids == oracle_greedy(oracle, prompt, 10), name


def test_the_whole_adapter_lies_in_the_pages_it_was_given(served: Served) -> None:
    served.engine.run([greedy("a", [3, 4, 5], 2, served.digests["all-linear"])])
    adapter = served.engine.engine._adapters.get(served.digests["all-linear"])
    path = served.home.adapter_directory(adapter.manifest.digest) / "adapter.safetensors"
    (found,) = [torch.cat(list(adapter.vector.parts(0, adapter.manifest.num_elements, 1)))]
    stored = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    assert torch.equal(found.flatten().view(torch.uint8), stored[-found.numel() * found.element_size() :])
