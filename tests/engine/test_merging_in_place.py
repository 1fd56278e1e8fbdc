"""Adapters merged in place by an engine with a GPU's memory: the paged pool, recorded steps and weights of its own."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from rekindle.engine.memory import page_bytes_for
from rekindle.engine.merging import Place
from rekindle.engine.merging_in_place import InPlaceMerge, own_linears
from rekindle.engine.models.registry import read_architecture, read_config
from rekindle.engine.scheduler.merging import MergeState, StepMix
from rekindle.engine.vectors import PagedVector
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.store.model_layout import tensor_shapes
from support.devices import OwnWeights, PagedDevice, RerunRecorder, TensorDriven
from support.engines import greedy
from support.merging import ADAPTERS, MergingEngine, Served
from support.oracle import oracle_greedy, random_prompts

pytest.importorskip("peft")


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp(request.param), request.param)


class InPlaceEngine(MergingEngine):
    """An engine that merges in place, and its recordings."""

    def __init__(self, served: Served, **changes: object) -> None:
        self.recorder, kernels = RerunRecorder(), TensorDriven()
        shapes = tensor_shapes(read_config(served.model_dir))
        super().__init__(
            served,
            device=PagedDevice(lambda: kernels, self.recorder),
            weights=OwnWeights(served.model_dir / "model.safetensors", torch.float32, shapes),
            **{"merge_bytes": 0, "merge_in_place": True, **changes},
        )
        self.linears = own_linears(self.engine._runner._model)
        self.unmerged = self.weights()
        resident = self.engine._adapters

        def known() -> Iterator[Any]:
            yield from (resident.get(digest).matrices for digest in resident.resident())
            if self.merging._negated is not None:
                yield self.merging._negated[1]

        kernels.known = known

    @property
    def merging(self) -> InPlaceMerge:
        merging = self.engine._merging
        assert isinstance(merging, InPlaceMerge)
        return merging

    @property
    def num_replays(self) -> int:
        return sum(recording.num_replays for recording in self.recorder.recordings)

    def weights(self) -> dict[Place, torch.Tensor]:
        return {place: weight_NK.view(torch.int32).clone() for place, weight_NK in self.linears.items()}

    def changed(self) -> set[Place]:
        """Where weights differ from the base's in any bit."""
        return {place for place, bits in self.weights().items() if not torch.equal(bits, self.unmerged[place])}

    def texts(self, names: list[str | None], num_tokens: int, key: str) -> None:
        """Let one sequence of each name decode in one batch, and compare its text with PEFT's."""
        self.load(names)
        requests = []
        for i, name in enumerate(names):
            prompt = random_prompts(seed=i)[1 + i % 2]
            requests.append(greedy(f"{key}-{i}", prompt, num_tokens, self.served.digest(name)))
        outputs = self.run(requests)
        for name, request in zip(names, requests, strict=True):
            expected = oracle_greedy(self.served.oracles[name], list(request.prompt_token_ids), num_tokens)
            assert outputs[request.request_id].token_ids == expected, (key, name)


@pytest.fixture
def in_place(engine_of: Callable[..., InPlaceEngine]) -> Callable[..., InPlaceEngine]:
    return partial(engine_of, kind=InPlaceEngine)


def mergeable(served: Served) -> list[str]:
    tied = served.base.config.tie_word_embeddings
    return [name for name in ADAPTERS if name in served.manifests and not (tied and name == "head")]


def test_in_float32_every_row_of_a_replayed_mixed_batch_equals_peft_whichever_adapter_is_merged(
    served: Served, in_place: Callable[..., InPlaceEngine]
) -> None:
    engine = in_place(served)
    others: list[str | None] = [name for name in ("attention", "head", "saved-head") if name in served.manifests]
    for merged in mergeable(served):
        assert engine.merge(merged) is MergeState.READY
        before, replays = engine.engine.stats().steps_merged_total, engine.num_replays
        engine.texts([merged, None, *others, merged], 10, merged)
        assert engine.engine.stats().steps_merged_total > before + 8
        assert engine.num_replays > replays
    graphs = engine.engine._runner._graphs
    assert graphs is not None and any(shape.unmerged_rank for shape in graphs._recorded)


def test_steps_of_the_merged_adapter_alone_are_replayed_from_recordings_of_the_base(
    llama: Served, in_place: Callable[..., InPlaceEngine]
) -> None:
    engine = in_place(llama)
    engine.texts([None, None], 12, "base")
    assert engine.merge("all-rank-64") is MergeState.READY
    engine.texts(["all-rank-64", "all-rank-64"], 12, "first")
    recordings, replays = len(engine.recorder.recordings), engine.num_replays
    engine.texts(["all-rank-64", "all-rank-64"], 12, "merged")
    engine.texts([None, None], 12, "base again")
    assert len(engine.recorder.recordings) == recordings
    assert engine.num_replays > replays + 12
    graphs = engine.engine._runner._graphs
    assert graphs is not None
    assert any(shape.rows == 2 and not shape.rank and not shape.unmerged_rank for shape in graphs._recorded)


def test_weights_are_restored_to_the_bit_once_no_row_is_of_the_merged_adapter(
    llama: Served, in_place: Callable[..., InPlaceEngine]
) -> None:
    engine = in_place(llama)
    for name in mergeable(llama):
        assert engine.merge(name) is MergeState.READY
        assert engine.changed()
        engine.texts([None], 4, f"after {name}")
        assert not engine.changed()
    states = [outcome.state for outcome in engine.policy.news]
    assert states.count(MergeState.READY) == states.count(MergeState.RESTORED) == len(mergeable(llama))


def test_an_adapter_that_is_refused_leaves_the_weights_as_they_were(
    llama: Served, in_place: Callable[..., InPlaceEngine]
) -> None:
    engine = in_place(llama)
    assert engine.merge("huge") is MergeState.REFUSED
    assert not engine.changed()
    engine.texts(["huge", None], 8, "refused")


def test_a_version_that_is_removed_while_merged_ends_as_it_began_and_leaves_the_weights(
    llama: Served, in_place: Callable[..., InPlaceEngine]
) -> None:
    engine = in_place(llama)
    assert engine.merge("attention") is MergeState.READY
    prompt, digest = random_prompts(seed=8)[2], llama.digest("attention")
    engine.submit("running", greedy("running", prompt, 12, digest))
    for _ in range(5):
        engine.step()
    assert digest is not None and engine.changed()
    engine.policy.target = None
    engine.engine.remove_adapter(digest)
    assert engine.run()["running"].token_ids == oracle_greedy(llama.oracles["attention"], prompt, 12)
    assert not engine.changed()
    assert engine.merge("head") is MergeState.READY


def pages_of(engine: InPlaceEngine, digest: AdapterDigest) -> list[int]:
    vector = engine.engine._adapters.get(digest).vector
    assert isinstance(vector, PagedVector)
    return vector._pages_M.tolist()


def tight_pool(served: Served, num_spare: int) -> int:
    """Bytes of a pool that holds so many pages beside the largest adapter."""
    arch = read_architecture(read_config(served.model_dir))
    page_bytes = page_bytes_for(arch.attention[0], arch.num_layers, 16, torch.float32)
    return (-(-served.manifests["all-rank-64"].num_elements * 4 // page_bytes) + num_spare) * page_bytes


def test_an_adapter_that_comes_back_in_other_pages_while_merged_is_taken_off_others_from_there(
    llama: Served, in_place: Callable[..., InPlaceEngine]
) -> None:
    """No step runs between, since those who take its pages leave again before they run."""
    engine = in_place(llama, memory_bytes=tight_pool(llama, 3))
    digest = llama.digest("attention")
    assert digest is not None and engine.merge("attention") is MergeState.READY
    pages, news, steps = pages_of(engine, digest), len(engine.policy.news), engine.engine.stats().steps_total
    for name in ("all-rank-64", "just-small-enough"):
        engine.submit(name, greedy(name, [3, 4], 1, llama.digest(name)))
        engine.step()
        engine.await_loads()
        engine.engine.abort(RequestId(name))
        engine.step()
    assert engine.engine._adapters.find(digest) is None
    assert engine.engine.stats().steps_total == steps
    assert engine.changed()
    engine.texts(["attention", None, "attention"], 8, "back")
    assert pages_of(engine, digest) != pages
    assert len(engine.policy.news) == news, "the weights stayed as they were"


def test_merging_goes_on_where_adapters_take_turns_in_a_small_pool(
    llama: Served, in_place: Callable[..., InPlaceEngine]
) -> None:
    engine = in_place(llama, memory_bytes=tight_pool(llama, 7))
    for turn in range(2):
        for name in ("all-rank-64", "attention", "just-small-enough"):
            assert engine.merge(name) is MergeState.READY
            engine.texts([name, None], 6, f"{name}-{turn}")
    assert engine.engine.stats().adapter_evictions_total > 2


def test_a_step_that_fails_while_an_adapter_is_merged_is_run_again_on_the_bases_weights(
    llama: Served, in_place: Callable[..., InPlaceEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = in_place(llama)
    assert engine.merge("attention") is MergeState.READY
    model = engine.engine._runner._model
    forward, failures = model.forward, []

    def fail_once(*arguments: Any) -> torch.Tensor:
        if not failures:
            failures.append(engine.changed())
            raise torch.OutOfMemoryError("no room")
        failures.append(engine.changed())
        return forward(*arguments)

    monkeypatch.setattr(model, "forward", fail_once)
    engine.texts(["attention"], 4, "failing")
    assert failures[0] and not failures[1]


def test_the_policy_is_told_how_long_updates_took_in_eager_and_in_replayed_steps(
    llama: Served, in_place: Callable[..., InPlaceEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = in_place(llama)
    told: list[tuple[StepMix, AdapterDigest | None, float]] = []
    monkeypatch.setattr(engine.policy, "note_step", lambda *arguments: told.append(arguments))
    engine.texts(["attention"], 16, "unmerged")
    assert engine.num_replays > 4
    assert len(told) == engine.engine.stats().steps_total
    assert all(merged is None and seconds > 0 for _, merged, seconds in told)
    told.clear()
    engine.merge("attention")
    told.clear()
    engine.texts(["attention"], 16, "merged")
    assert told and all(merged == llama.digest("attention") and seconds == 0 for _, merged, seconds in told)
