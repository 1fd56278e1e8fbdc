"""Adapters against PEFT in float32, alone and mixed with others in one batch, for every feature that is served."""

from pathlib import Path
from typing import Any

import pytest

from rekindle.engine import host_memory
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import AdapterDigest
from rekindle.store import vector_sources
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.engines import LocalEngine, Output, greedy
from support.oracle import oracle_greedy, oracle_prompt_logprobs, random_prompts
from support.tiny import make_adapter, make_model

pytest.importorskip("peft")

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp-rank-1": {"r": 1, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "all-linear-rank-64": {"r": 64, "lora_alpha": 16, "target_modules": "all-linear"},
    "rslora": {"r": 16, "use_rslora": True, "target_modules": ALL_LINEAR},
    "patterns": {
        "r": 4,
        "target_modules": ALL_LINEAR,
        "rank_pattern": {"q_proj": 7, r"layers\.1\..*down_proj": 3},
        "alpha_pattern": {"k_proj": 32, r"layers\.2\.self_attn\.q_proj": 2},
    },
    "regex": {"r": 5, "target_modules": r".*layers\.[02]\.(self_attn\.[qo]_proj|mlp\.up_proj)"},
    "some-layers": {"r": 6, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "exclusions": {"r": 6, "target_modules": ALL_LINEAR, "exclude_modules": ["v_proj", "model.layers.0.mlp.up_proj"]},
    "value-only": {"r": 3, "target_modules": ["v_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "o_proj"]},
    "saved-head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved-embedding": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


def import_adapter_again(served: "Served", name: str) -> AdapterManifest:
    """The manifest of an adapter of `served`; its files are there already."""
    directory = served.adapter_dirs[name]
    return import_adapter(directory.parent.parent.parent / name, served.manifest, served.model_dir, served.home)


class Served:
    """One tiny base with every adapter of `ADAPTERS`, and PEFT's own model for each."""

    def __init__(self, directory: Path) -> None:
        self.base = make_model("llama", directory / "source")
        self.home = home = Home(directory / "home")
        self.manifest = import_model(directory / "source", home)
        self.model_dir = home.model_directory(self.manifest.digest)
        self.engine = LocalEngine(self.model_dir, self.manifest)
        self.oracles: dict[str, Any] = {}
        self.digests: dict[str, AdapterDigest] = {}
        self.adapter_dirs: dict[str, Path] = {}
        for seed, (name, config) in enumerate(ADAPTERS.items()):
            self.oracles[name] = make_adapter(self.base, directory / name, seed, **config)
            manifest = import_adapter(directory / name, self.manifest, self.model_dir, home)
            self.adapter_dirs[name] = home.adapter_directory(manifest.digest)
            self.digests[name] = self.engine.add_adapter(self.adapter_dirs[name], manifest)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("peft"))


@pytest.mark.parametrize("name", list(ADAPTERS))
def test_an_adapter_alone_equals_peft(served: Served, name: str) -> None:
    for i, prompt in enumerate(random_prompts()[1:]):
        key = f"{name}-{i}"
        request = greedy(key, prompt, 8, served.digests[name], prompt_logprobs=0)
        output = served.engine.run([request])[key]
        assert output.token_ids == oracle_greedy(served.oracles[name], prompt, 8)
        assert output.prompt_logprobs is not None
        found = [entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None]
        assert found == pytest.approx(oracle_prompt_logprobs(served.oracles[name], prompt), abs=2e-4)


def test_all_adapters_and_the_base_share_batches_without_touching_each_other(served: Served) -> None:
    names: list[str | None] = [None, *ADAPTERS, None]
    requests = []
    for i, name in enumerate(names):
        prompt = random_prompts(seed=i)[1 + i % 3]
        requests.append(greedy(f"mixed-{i}", prompt, 10, served.digests[name] if name else None))
    outputs = served.engine.run(requests)
    for i, name in enumerate(names):
        oracle = served.oracles[name] if name else served.base
        assert outputs[f"mixed-{i}"].token_ids == oracle_greedy(oracle, list(requests[i].prompt_token_ids), 10)


def test_the_base_is_really_changed_by_each_adapter(served: Served) -> None:
    prompt = random_prompts()[2]
    base = oracle_prompt_logprobs(served.base, prompt)
    for name, oracle in served.oracles.items():
        changed = oracle_prompt_logprobs(oracle, prompt)
        assert max(abs(a - b) for a, b in zip(base, changed, strict=True)) > 0.05, name


def test_prefixes_are_not_shared_between_adapters(served: Served) -> None:
    prompt = random_prompts(seed=99)[-1]
    for i, name in enumerate(("attention", "value-only", None, "attention")):
        digest = served.digests[name] if name else None
        output = served.engine.run([greedy(f"prefix-{i}", prompt, 4, digest)])[f"prefix-{i}"]
        oracle = served.oracles[name] if name else served.base
        assert output.token_ids == oracle_greedy(oracle, prompt, 4)
        assert output.cached_tokens == (96 if i == 3 else 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["attention", "head", "embedding", "saved-head", "saved-embedding"])
def test_deterministic_text_of_an_adapter_does_not_depend_on_the_batch(served: Served, name: str, dtype: str) -> None:
    def run(count: int) -> Output:
        engine = LocalEngine(served.model_dir, served.manifest, dtype=dtype, deterministic=True)
        manifest = import_adapter_again(served, name)
        digest = engine.add_adapter(served.adapter_dirs[name], manifest)
        prompts = [random_prompts(seed)[2] for seed in range(count)]
        requests = [greedy(f"r{i}", prompt, 8, digest, logprobs=2) for i, prompt in enumerate(prompts)]
        output = engine.run(requests)["r0"]
        engine.close()
        return output

    alone, together = run(1), run(6)
    assert alone.token_ids == together.token_ids
    assert alone.logprobs == together.logprobs


def test_a_file_in_another_dtype_is_converted_piece_by_piece(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompts()[2]

    def run(piece: int) -> Output:
        monkeypatch.setattr(host_memory, "_STAGED_ELEMENTS", piece)
        engine = LocalEngine(served.model_dir, served.manifest, dtype="bfloat16")
        digest = engine.add_adapter(served.adapter_dirs["patterns"], import_adapter_again(served, "patterns"))
        output = engine.run([greedy("r", prompt, 8, digest, logprobs=3)])["r"]
        engine.close()
        return output

    assert run(1000) == run(1 << 20)


def test_a_load_that_fails_for_whatever_reason_ends_its_requests_and_no_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(served.model_dir, served.manifest)
    digest = engine.add_adapter(served.adapter_dirs["regex"], import_adapter_again(served, "regex"))
    prompt = random_prompts()[1]
    with monkeypatch.context() as patched:
        patched.setattr(vector_sources, "read_checksums", lambda path: 1 / 0)
        outputs = engine.run([greedy("bad", prompt, 4, digest), greedy("good", prompt, 4)])
    assert "could not be loaded: division by zero" in (outputs["bad"].error or "")
    assert outputs["good"].token_ids == oracle_greedy(served.base, prompt, 4)
    again = engine.run([greedy("again", prompt, 4, digest)])["again"]
    assert again.token_ids == oracle_greedy(served.oracles["regex"], prompt, 4)
    engine.close()
