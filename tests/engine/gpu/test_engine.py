"""A whole engine on a GPU's memory and kernels against one on the CPU's, with the same random weights."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.clock import SystemClock
from rekindle.engine import engine as engine_module
from rekindle.engine.devices import CudaDevice, Device
from rekindle.engine.engine import Engine
from rekindle.engine.kernels.gpu.triton_kernels import TritonKernels
from rekindle.engine.kernels.linear import PLAIN
from rekindle.engine.scheduler.merging import MergeState
from rekindle.protocol.generation import GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.replica import EngineSettings
from rekindle.protocol.sampling import SamplingParams
from rekindle.testing.random_model import RandomWeights, model_manifest, named, write_adapter
from rekindle.units import MIB
from support.devices import PagedDevice, RerunRecorder
from support.policies import ToldPolicy

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


class Driven:
    """An engine with three adapters of different ranks, stepped until its requests have ended."""

    def __init__(
        self, directory: Path, device: Device | None, torch_device: torch.device, *, merge_in_place: bool = False
    ) -> None:
        (directory / "config.json").write_text(json.dumps(CONFIG))
        model = model_manifest(CONFIG)
        settings = EngineSettings(
            str(directory), model, "float32", 2 * MIB, 16, 64, 8, 64, 1, merge_in_place=merge_in_place
        )
        self._wakened = threading.Event()
        # So spread out that no two tokens are almost as likely.
        weights = RandomWeights(CONFIG, torch.float32, torch_device, deviation=0.12, drawn_on=torch.device("cpu"))
        self.engine = Engine(settings, SystemClock(), self._wakened.set, device, weights)
        files = []
        for rank in (3, 8, 40):
            path = directory / f"rank-{rank}.safetensors"
            files.append((write_adapter(model, TARGETS, rank, path, seed=rank), path))
        self.digests: list[AdapterDigest | None] = [None]
        for manifest, path in named(files, len(files)):
            self.engine.add_adapter(manifest, str(path))
            self.digests.append(manifest.digest)

    def texts(self, prompts: Sequence[tuple[int, ...]], num_tokens: int, **sampling: Any) -> dict[str, list[int]]:
        texts: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            params = SamplingParams(num_tokens, seed=i, **({"temperature": 0.0} | sampling))
            name = RequestId(f"r{i}")
            texts[name] = []
            self.engine.submit(GenerateRequest(name, prompt, params, adapter=self.digests[i % len(self.digests)]))
        while self.engine.stats().num_running or self.engine.stats().num_waiting:
            if not self.engine.has_runnable:
                self._wakened.wait(10)
            self._wakened.clear()
            for chunk in self.engine.step():
                assert chunk.error is None
                texts[chunk.request_id] += chunk.token_ids
        return texts


@pytest.fixture
def pair(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Driven, Driven, Callable[[], int]]]:
    """An engine of this device, whose policy merges what it is told, one of the CPU, and how many steps of the first
    were replayed."""
    monkeypatch.setattr(engine_module, "MergePolicy", ToldPolicy)
    recorder = RerunRecorder()
    on_gpu: Device = PagedDevice(lambda: TritonKernels(PLAIN), recorder)
    if device.type == "cuda":
        on_gpu = CudaDevice("cuda")
    directories = [tmp_path / name for name in ("gpu", "cpu")]
    for directory in directories:
        directory.mkdir()
    ours = Driven(directories[0], on_gpu, device, merge_in_place=True)
    theirs = Driven(directories[1], None, torch.device("cpu"))
    yield ours, theirs, lambda: sum(recording.num_replays for recording in recorder.recordings)
    ours.engine.close()
    theirs.engine.close()


def prompts_of(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(0, 199, (length,), generator=draw).tolist()) for length in lengths]


def test_text_under_mixed_adapters_is_that_of_the_cpu(
    pair: tuple[Driven, Driven, Callable[[], int]], device: torch.device
) -> None:
    ours, theirs, num_replays = pair
    prompts = prompts_of([5, 20, 1, 70])
    # The first time each sequence waits for its adapter; the second time all decode together, long enough to record.
    for _ in range(2):
        assert ours.texts(prompts, 12) == theirs.texts(prompts, 12)
    assert device.type == "cuda" or num_replays() > 1


def test_draws_are_those_of_the_cpu(pair: tuple[Driven, Driven, Callable[[], int]]) -> None:
    ours, theirs, _ = pair
    prompts = prompts_of([4, 4, 4])
    sampling = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
    assert ours.texts(prompts, 5, **sampling) == theirs.texts(prompts, 5, **sampling)


def test_text_is_that_of_the_cpu_while_an_adapter_is_merged_in_place(
    pair: tuple[Driven, Driven, Callable[[], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs, _ = pair
    policy, told = ours.engine._merge_policy, []
    assert isinstance(policy, ToldPolicy)
    monkeypatch.setattr(policy, "note_step", lambda *arguments: told.append(arguments))
    prompts = prompts_of([5, 9, 1, 7])
    expected = theirs.texts(prompts, 8)
    ours.texts(prompts, 1)  # so that all start together
    policy.target = ours.digests[2]
    assert ours.texts(prompts, 8) == expected
    policy.target = None
    assert ours.texts(prompts[:1], 2) == {name: text[:2] for name, text in expected.items() if name == "r0"}
    assert [outcome.state for outcome in policy.news] == [MergeState.READY, MergeState.RESTORED]
    assert ours.engine.stats().steps_merged_total == 8
    assert sum(merged is not None for _, merged, _ in told) == 8
    assert all(seconds > 0 for mix, merged, seconds in told if mix.rows_of.keys() - {merged})
