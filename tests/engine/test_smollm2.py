"""The demo model against transformers: equal text in float32, and in bfloat16 the same choice wherever it is clear."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.engine import engine as engine_module
from rekindle.engine.scheduler.merging import MergeState
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from rekindle.units import MIB
from support.engines import LocalEngine, greedy
from support.merging import ToldPolicy
from support.oracle import oracle_prompt_logprobs
from support.server import DEMO_ADAPTERS, GGUF

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXT = (
    "<|im_start|>user\nWrite two sentences about the sea.<|im_end|>\n<|im_start|>assistant\n"
    "The sea covers most of the Earth, and its tides follow the Moon. In 1969, three people flew there; "
    "the distance is about 384,000 km. Une phrase en français, \N{GREEK SMALL LETTER ALPHA} and \N{ROCKET}."
)
NUM_NEW_TOKENS = 40


class Served:
    """The demo model imported from GGUF, its adapters, and transformers' reading of the same weights."""

    def __init__(self, directory: Path) -> None:
        self.home = Home(directory / "home")
        self.manifest = import_model(GGUF, self.home)
        self.model_dir = self.home.model_directory(self.manifest.digest)
        copy = directory / "hf"
        shutil.copytree(self.model_dir, copy)
        (copy / "manifest.json").unlink()
        self.hf_dir = copy
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(copy)

    def oracle(self, dtype: torch.dtype, adapter: str | None) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.hf_dir, dtype=dtype).eval()
        return model if adapter is None else peft.PeftModel.from_pretrained(model, DEMO_ADAPTERS / adapter).eval()

    def engine(self, dtype: str, **changes: object) -> tuple[LocalEngine, dict[str | None, AdapterDigest | None]]:
        settings = {"dtype": dtype, "memory_bytes": 256 * MIB, "num_threads": 2, **changes}
        engine = LocalEngine(self.model_dir, self.manifest, **settings)
        digests: dict[str | None, AdapterDigest | None] = {None: None}
        for source in sorted(DEMO_ADAPTERS.iterdir()):
            manifest = import_adapter(source, self.manifest, self.model_dir, self.home)
            digests[source.name] = engine.add_adapter(self.home.adapter_directory(manifest.digest), manifest)
        return engine, digests

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    if not GGUF.exists():
        pytest.skip("the demo model has not been fetched; `make test` does")
    return Served(tmp_path_factory.mktemp("smollm2"))


def test_float32_text_equals_transformers_and_peft_in_one_mixed_batch(served: Served) -> None:
    engine, digests = served.engine("float32")
    prompt = served.tokens(TEXT[: TEXT.index("The sea covers")])
    names: list[str | None] = [None, "pirate", None, "json", "emoji"]
    requests = [greedy(f"r{i}", prompt, NUM_NEW_TOKENS, digests[name]) for i, name in enumerate(names)]
    outputs = engine.run(requests)
    engine.close()
    for name in (None, "pirate", "json"):
        model = served.oracle(torch.float32, name)
        with torch.inference_mode():
            generated = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                max_new_tokens=NUM_NEW_TOKENS,
                min_new_tokens=NUM_NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=-1,
            )
        for i, served_name in enumerate(names):
            if served_name == name:
                assert outputs[f"r{i}"].token_ids == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", [None, "pirate"])
def test_bfloat16_chooses_as_float32_does_wherever_the_choice_is_clear(served: Served, name: str | None) -> None:
    """Teacher-forced. A choice is clear if the oracle's margin exceeds twice the largest error of transformers' own
    bfloat16."""
    tokens = served.tokens(TEXT)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            logits[dtype] = served.oracle(dtype, name)(torch.tensor([tokens])).logits[0, :-1].float()
    exact = logits[torch.float32].log_softmax(-1)
    rounding = float((logits[torch.bfloat16].log_softmax(-1) - exact).abs().max())
    engine, digests = served.engine("bfloat16")
    output = engine.run([greedy("forced", tokens, 1, digests[name], prompt_logprobs=1)])["forced"]
    engine.close()
    assert output.prompt_logprobs is not None
    entries = [entry for entry in output.prompt_logprobs if entry is not None]
    top2 = exact.topk(2, dim=-1)
    is_clear = (top2.values[:, 0] - top2.values[:, 1]) > 2 * rounding
    assert int(is_clear.sum()) > 5
    for entry, best, clear in zip(entries, top2.indices[:, 0].tolist(), is_clear.tolist(), strict=True):
        assert not clear or entry.top[0][0] == best
    found = torch.tensor([entry.logprob for entry in entries])
    expected = torch.tensor(oracle_prompt_logprobs_of(exact, tokens))
    theirs = torch.tensor(oracle_prompt_logprobs_of(logits[torch.bfloat16].log_softmax(-1), tokens))
    assert float((found - expected).square().mean()) <= 1.5 * float((theirs - expected).square().mean())


def test_with_an_adapter_merged_its_rows_and_the_bases_meet_the_same_bound(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MergePolicy", ToldPolicy)
    tokens = served.tokens(TEXT)
    engine, digests = served.engine("bfloat16", merge_bytes=512 * MIB, max_step_tokens=512)
    policy = engine.engine._merge_policy
    assert isinstance(policy, ToldPolicy)
    policy.target = digests["pirate"]
    engine.run([greedy("load", tokens[:2], 60, digests["pirate"])])
    assert [outcome.state for outcome in policy.news] == [MergeState.READY]
    before = engine.engine.stats().steps_merged_total
    names = (None, "pirate")
    outputs = engine.run([greedy(str(name), tokens, 1, digests[name], prompt_logprobs=0) for name in names])
    assert engine.engine.stats().steps_merged_total == before + 1, "both run in one step"
    engine.close()
    for name in names:
        exact, theirs = (
            torch.tensor(oracle_prompt_logprobs(served.oracle(dtype, name), tokens))
            for dtype in (torch.float32, torch.bfloat16)
        )
        entries = outputs[str(name)].prompt_logprobs or ()
        ours = torch.tensor([entry.logprob for entry in entries if entry is not None])
        assert float((ours - exact).square().mean()) <= 1.5 * float((theirs - exact).square().mean())


def oracle_prompt_logprobs_of(logprobs: torch.Tensor, tokens: list[int]) -> list[float]:
    return [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])]
