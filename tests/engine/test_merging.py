"""Adapters merged into the weights of a running engine: what comes out, and what happens when something fails."""

import copy
from collections.abc import Callable

import pytest
import torch

from rekindle.engine import merging
from rekindle.engine.merging import MOST_GROWTH
from rekindle.engine.models.registry import read_architecture, read_config
from rekindle.engine.scheduler.merging import MergeState
from rekindle.engine.weights import Weights
from rekindle.store.model_layout import tensor_shapes
from support.engines import Output, greedy
from support.merging import ADAPTERS, BUDGET, MergingEngine, Served
from support.oracle import oracle_greedy, oracle_prompt_logprobs, random_prompts

pytest.importorskip("peft")


@pytest.fixture(scope="module", params=["llama", "llama-biased", "qwen3", "gemma2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp(request.param), request.param)


def test_in_float32_every_row_of_a_mixed_batch_equals_peft_whichever_adapter_is_merged(
    served: Served, engine_of: Callable[..., MergingEngine]
) -> None:
    engine = engine_of(served)
    others = [name for name in ("attention", "head", "saved-head", "embedding") if name in served.manifests]
    for seed, merged in enumerate(name for name in ADAPTERS if name in served.manifests):
        assert engine.merge(merged) is MergeState.READY
        names = [merged, None, *others, merged]
        requests = []
        for i, name in enumerate(names):
            prompt = random_prompts(seed=10 * seed + i)[1 + i % 2]
            requests.append(greedy(f"{merged}-{i}", prompt, 6, served.digest(name)))
        engine.load(names)
        before = engine.engine.stats().steps_merged_total
        outputs = engine.run(requests)
        assert engine.engine.stats().steps_merged_total > before + 4
        for name, request in zip(names, requests, strict=True):
            expected = oracle_greedy(served.oracles[name], list(request.prompt_token_ids), 6)
            assert outputs[request.request_id].token_ids == expected, (merged, name)


def growth(served: Served, name: str) -> float:
    """The largest ||W + D||_F / ||W||_F of an adapter's modules, by PEFT."""
    found = []
    for module in served.oracles[name].modules():
        if hasattr(module, "get_delta_weight"):
            weight = module.base_layer.weight
            found.append(float((weight + module.get_delta_weight("default")).norm() / weight.norm()))
    return max(found)


@pytest.mark.parametrize("merged", ["attention", "mlp-rank-1", "all-rank-64", "just-small-enough", "head"])
def test_in_bfloat16_all_rows_are_as_near_to_float32_as_bfloat16_is_held_to_be(
    served: Served, engine_of: Callable[..., MergingEngine], merged: str
) -> None:
    """Teacher-forced, with the bound that the engine meets unmerged: the mean square error of transformers' own
    bfloat16, and half as much again."""
    if merged not in served.manifests:
        pytest.skip("the head of this base is its embedding")
    engine = engine_of(served, dtype="bfloat16", max_step_tokens=2000)
    assert engine.merge(merged) is MergeState.READY
    names = [None, merged, "some-layers"] * 6
    prompts = [random_prompts(seed=i)[3] for i in range(len(names))]
    engine.load(names)
    before = engine.engine.stats().steps_merged_total
    outputs = engine.run(
        greedy(f"r{i}", prompt, 1, served.digest(name), prompt_logprobs=0)
        for i, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    )
    assert engine.engine.stats().steps_merged_total == before + 1, "all rows share one step"
    for name in (None, merged, "some-layers"):
        rounded = copy.deepcopy(served.oracles[name]).bfloat16()
        ours, theirs = [], []
        for i, prompt in enumerate(prompts):
            if names[i] == name:
                exact = torch.tensor(oracle_prompt_logprobs(served.oracles[name], prompt))
                entries = outputs[f"r{i}"].prompt_logprobs or ()
                ours.append(torch.tensor([entry.logprob for entry in entries if entry is not None]) - exact)
                theirs.append(torch.tensor(oracle_prompt_logprobs(rounded, prompt)) - exact)
        error, bound = (float(torch.cat(parts).square().mean()) for parts in (ours, theirs))
        assert error <= 1.5 * bound, name


def test_a_step_of_rows_of_the_merged_adapter_alone_computes_no_update(
    llama: Served, engine_of: Callable[..., MergingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(llama)
    engine.merge("all-rank-64")
    kernels = engine.engine._runner._model.kernels
    update, calls = kernels.lora, []
    monkeypatch.setattr(kernels, "lora", lambda *arguments: (calls.append(arguments), update(*arguments)))
    engine.ask("all-rank-64", random_prompts(seed=3)[2], "alone")
    assert not calls
    engine.ask("attention", random_prompts(seed=3)[2], "other")
    assert calls


def test_the_base_weights_are_never_written(llama: Served, engine_of: Callable[..., MergingEngine]) -> None:
    path = llama.model_dir / "model.safetensors"
    stored = path.read_bytes()
    engine = engine_of(llama)
    for name in ADAPTERS:
        engine.merge(name)
        engine.ask(name, random_prompts(seed=5)[1], f"use-{name}")
    shapes = tensor_shapes(read_config(llama.model_dir))
    fresh, used = Weights(path, torch.float32, shapes), engine.copies._base
    assert path.read_bytes() == stored
    for name in shapes:
        assert torch.equal(fresh.tensor(name), used.tensor(name))


def test_copies_never_take_more_than_their_budget_and_the_least_recently_used_goes(
    llama: Served, engine_of: Callable[..., MergingEngine]
) -> None:
    config = read_architecture(read_config(llama.model_dir))
    sizes = {name: merging.adapter_size(llama.manifests[name], config, 4).merge_bytes for name in ("attention", "head")}
    engine = engine_of(llama, merge_bytes=sum(sizes.values()))
    engine.merge("attention")
    assert engine.copies.num_bytes == sizes["attention"]
    engine.merge("head")
    engine.ask("attention", random_prompts(seed=6)[1], "unmerged")
    assert engine.copies.num_bytes == sum(sizes.values())
    assert engine.merge("all-rank-64") is MergeState.REFUSED
    assert "merge_bytes" in engine.policy.news[-1].reason
    engine.merge("some-layers")
    assert engine.copies.num_bytes <= sum(sizes.values())
    dropped = [outcome.digest for outcome in engine.policy.news if outcome.state is MergeState.DROPPED]
    assert dropped == [llama.digest("attention")]


def test_an_adapter_so_large_that_its_rounding_would_show_in_other_rows_is_never_merged(
    llama: Served, engine_of: Callable[..., MergingEngine]
) -> None:
    assert growth(llama, "huge") > MOST_GROWTH > growth(llama, "just-small-enough") > 0.95 * MOST_GROWTH
    engine = engine_of(llama)
    assert engine.merge("huge") is MergeState.REFUSED
    assert "would grow from norm" in engine.policy.news[-1].reason
    prompt = random_prompts(seed=7)[1]
    assert engine.ask("huge", prompt, "r").token_ids == oracle_greedy(llama.oracles["huge"], prompt, 8)
    assert engine.copies.num_bytes == 0
    assert engine.merge("just-small-enough") is MergeState.READY


def test_a_removed_version_leaves_no_copy_and_its_running_request_ends_as_it_began(
    llama: Served, engine_of: Callable[..., MergingEngine]
) -> None:
    engine = engine_of(llama)
    engine.merge("attention")
    prompt = random_prompts(seed=8)[2]
    engine.submit("running", greedy("running", prompt, 12, llama.digest("attention")))
    for _ in range(5):
        engine.step()
    digest = llama.digest("attention")
    assert digest is not None and engine.policy.merged == digest
    engine.policy.target = None
    engine.engine.remove_adapter(digest)
    assert engine.copies.num_bytes == 0
    assert engine.run()["running"].token_ids == oracle_greedy(llama.oracles["attention"], prompt, 12)
    assert engine.merge("head") is MergeState.READY


def test_a_removal_while_its_copy_is_being_written_ends_the_writing(
    llama: Served, engine_of: Callable[..., MergingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_BUILD_SHARE", 1e-9)
    engine = engine_of(llama)
    digest = engine.policy.target = llama.digest("attention")
    engine.ask("attention", random_prompts(seed=9)[1], "begins")
    assert digest is not None and engine.copies.num_bytes > 0 and not engine.policy.news
    engine.policy.target = None
    engine.engine.remove_adapter(digest)
    assert engine.copies.num_bytes == 0


def test_a_merge_that_fails_ends_nothing_but_itself(
    llama: Served, engine_of: Callable[..., MergingEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(llama)
    with monkeypatch.context() as patched:
        patched.setattr(merging, "place_rows", lambda *_: 1 / 0)
        assert engine.merge("attention") is MergeState.REFUSED
    assert "division by zero" in engine.policy.news[-1].reason
    assert engine.copies.num_bytes == 0
    prompt = random_prompts(seed=10)[1]
    assert engine.ask("attention", prompt, "r").token_ids == oracle_greedy(llama.oracles["attention"], prompt, 8)
    assert engine.merge("head") is MergeState.READY


def test_a_deterministic_engine_merges_nothing(llama: Served, engine_of: Callable[..., MergingEngine]) -> None:
    def run(merge_bytes: int) -> Output:
        engine = engine_of(llama, dtype="bfloat16", deterministic=True, merge_bytes=merge_bytes)
        output = engine.run([greedy("r", [5, 6, 7], 40, llama.digest("attention"), logprobs=2)])["r"]
        assert engine.engine._merging is None
        assert engine.engine.stats().steps_merged_total == 0
        return output

    assert run(BUDGET) == run(0)
