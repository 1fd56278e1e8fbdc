"""Decode steps from fixed buffers: what is replayed gives the text of what is run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.engine import graphs
from rekindle.protocol.identity import AdapterDigest
from rekindle.store.adapter_import import import_adapter
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.devices import PagedDevice, RerunRecorder, TensorDriven
from support.engines import LocalEngine, greedy
from support.oracle import oracle_greedy, random_prompts
from support.tiny import make_adapter, make_model

pytest.importorskip("peft")


class Served:
    def __init__(self, directory: Path) -> None:
        self.model: Any = make_model("llama", directory / "source")
        home = Home(directory / "home")
        manifest = import_model(directory / "source", home)
        model_dir = home.model_directory(manifest.digest)
        self.recorder, kernels = RerunRecorder(), TensorDriven()
        self.engine = LocalEngine(model_dir, manifest, device=PagedDevice(lambda: kernels, self.recorder))
        resident = self.engine.engine._adapters
        kernels.known = lambda: [resident.get(digest).matrices for digest in resident.resident()]
        self.oracles: list[Any] = []
        self.digests: list[AdapterDigest] = []
        for seed, rank in enumerate((4, 24)):
            source = directory / f"adapter-{seed}"
            self.oracles.append(make_adapter(self.model, source, seed, r=rank, target_modules="all-linear"))
            adapter = import_adapter(source, manifest, model_dir, home)
            self.digests.append(self.engine.add_adapter(home.adapter_directory(adapter.digest), adapter))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.engine.close()


def test_replayed_steps_give_the_same_text(served: Served) -> None:
    prompts = [random_prompts(seed)[1] for seed in range(5)]
    outputs = served.engine.run([greedy(f"r{i}", prompt, 20 - i) for i, prompt in enumerate(prompts)])
    assert sum(recording.num_replays for recording in served.recorder.recordings) > 10
    for i, prompt in enumerate(prompts):
        assert outputs[f"r{i}"].token_ids == oracle_greedy(served.model, prompt, 20 - i)


def test_adapters_that_come_and_go_need_no_new_recording(served: Served) -> None:
    prompt = random_prompts()[1]
    num_recordings = []
    for turn, order in enumerate(((0, 1), (1, 0), (1, 1))):
        names = [f"{turn}-base", *(f"{turn}-{place}-{i}" for place, i in enumerate(order))]
        digests = [None, *(served.digests[i] for i in order)]
        outputs = served.engine.run([greedy(*it) for it in zip(names, (prompt,) * 3, (16,) * 3, digests, strict=True)])
        models = [served.model, *(served.oracles[i] for i in order)]
        for name, model in zip(names, models, strict=True):
            assert outputs[name].token_ids == oracle_greedy(model, prompt, 16)
        num_recordings.append(len(served.recorder.recordings))
    assert num_recordings[1] == num_recordings[2]
    assert sum(recording.num_replays for recording in served.recorder.recordings) > 30


def test_rows_that_fill_a_batch_up_touch_nobodys_pages(served: Served) -> None:
    pool = served.engine.engine._memory.pool_PX
    assert pool is not None
    served.engine.run([greedy(f"r{i}", random_prompts(i)[1], 12) for i in range(3)])
    pool[-1] = 1.0
    before = pool.clone()
    served.engine.run([greedy(f"again-{i}", [7 + i, 8, 9], 12) for i in range(3)])
    assert any(recording.num_replays for recording in served.recorder.recordings)
    assert not torch.equal(pool[-1], before[-1])
    changed = (pool[:-1] != before[:-1]).any(1)
    assert int(changed.sum()) == 3  # fifteen tokens each


def test_a_shape_is_recorded_only_after_it_was_wanted_some_times(served: Served) -> None:
    served.engine.run([greedy("short", [1, 2, 3], graphs._WANTED_TIMES)])
    assert served.recorder.recordings == []
    served.engine.run([greedy("long", [1, 2, 3], graphs._WANTED_TIMES + 3)])
    assert len(served.recorder.recordings) == 1


def test_a_recording_that_fails_leaves_its_shape_to_eager_steps(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[object] = []

    def fail(function: object) -> None:
        attempts.append(function)
        raise torch.OutOfMemoryError("no room for a graph")

    monkeypatch.setattr(served.recorder, "record", fail)
    prompt = random_prompts()[1]
    outputs = served.engine.run([greedy("r", prompt, 16)])
    assert outputs["r"].token_ids == oracle_greedy(served.model, prompt, 16)
    assert len(attempts) == 1
