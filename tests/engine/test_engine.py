"""The engine as a whole on a tiny model: isolation of faults, determinism, refusals, adapters coming and going."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.clock import ManualClock, SystemClock
from rekindle.engine.adapter_sources import AdapterSources
from rekindle.engine.adapters import AdapterMemory
from rekindle.engine.devices import CudaDevice
from rekindle.engine.engine import CHECK_INTERVAL_S
from rekindle.engine.host_memory import HostMemory
from rekindle.engine.models.decoder import Decoder
from rekindle.engine.scheduler.plan import AdapterLoad
from rekindle.engine.scheduler.scheduler import Scheduler
from rekindle.errors import ConfigurationError, InternalError, InvalidRequest, ModelRejected, NotFound
from rekindle.policy.load_queue import LoadTiming
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.generation import FinishReason, GenerateRequest
from rekindle.protocol.identity import AdapterDigest, RequestId
from rekindle.protocol.models import ModelManifest
from rekindle.protocol.sampling import SamplingParams
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.engines import LocalEngine, Output, greedy
from support.oracle import oracle_greedy, random_prompts
from support.scheduling import make_manifest
from support.tiny import VOCABULARY, make_model

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, ModelManifest]:
    directory = tmp_path_factory.mktemp("engine")
    model = make_model("llama", directory / "source")
    home = Home(directory / "home")
    manifest = import_model(directory / "source", home)
    return model, home.model_directory(manifest.digest), manifest


def engine_of(tiny: tuple[Any, Path, ModelManifest], **changes: object) -> LocalEngine:
    return LocalEngine(tiny[1], tiny[2], **changes)


@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), IndexError("index out of memory bounds")])
def test_a_failing_sequence_ends_alone(
    tiny: tuple[Any, Path, ModelManifest], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    poison = VOCABULARY - 1
    forward = Decoder.forward

    def failing(self: Decoder, embedded: torch.Tensor, batch: Any, pool: Any) -> torch.Tensor:
        if bool((batch.token_ids_T == poison).any()):
            raise fault
        return forward(self, embedded, batch, pool)

    monkeypatch.setattr(Decoder, "forward", failing)
    engine = engine_of(tiny)
    good = [3, 4, 5, 6]
    outputs = engine.run([greedy("good", good, 6), greedy("bad", [7, poison, 8], 6)])
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert "out of memory" in (outputs["bad"].error or "")
    assert outputs["good"].token_ids == oracle_greedy(tiny[0], good, 6)
    engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_deterministic_text_does_not_depend_on_the_batch(tiny: tuple[Any, Path, ModelManifest], dtype: str) -> None:
    prompts = [random_prompts(seed)[2] for seed in range(6)]

    def request(i: int) -> GenerateRequest:
        return greedy(f"r{i}", prompts[i], 20, temperature=1.0, seed=i, logprobs=2, prompt_logprobs=1)

    def run(indices: list[int], max_step_tokens: int) -> dict[str, Output]:
        engine = engine_of(tiny, dtype=dtype, deterministic=True, max_step_tokens=max_step_tokens)
        outputs = engine.run([request(i) for i in indices])
        engine.close()
        return outputs

    together = run([0, 1, 2, 3, 4, 5], 64)
    for i in (0, 3):
        for max_step_tokens in (32, 256):
            alone = run([i], max_step_tokens)[f"r{i}"]
            assert alone.token_ids == together[f"r{i}"].token_ids
            assert alone.logprobs == together[f"r{i}"].logprobs
            assert alone.prompt_logprobs == together[f"r{i}"].prompt_logprobs


def test_seeded_text_is_the_same_after_preemption_and_resumption(tiny: tuple[Any, Path, ModelManifest]) -> None:
    prompt = random_prompts()[2]
    sampling = SamplingParams(max_tokens=24, seed=5, temperature=1.0, top_p=0.9)
    engine = engine_of(tiny)
    whole = engine.run([GenerateRequest(RequestId("whole"), tuple(prompt), sampling)])["whole"]
    resumed = GenerateRequest(
        RequestId("resumed"), tuple(prompt), sampling, epoch=1, generated_token_ids=tuple(whole.token_ids[:10])
    )
    engine.outputs["resumed"] = Output(token_ids=whole.token_ids[:10])
    engine.engine.submit(resumed)
    assert engine.run()["resumed"].token_ids == whole.token_ids
    engine.close()


def test_biases_outside_the_vocabulary_are_refused_with_the_number(tiny: tuple[Any, Path, ModelManifest]) -> None:
    engine = engine_of(tiny)
    with pytest.raises(InvalidRequest, match=str(VOCABULARY)) as met:
        engine.engine.submit(greedy("bad", [3], 2, logit_bias=((VOCABULARY, 1.0),)))
    assert met.value.field == "logit_bias"
    engine.close()


def test_tokens_outside_the_vocabulary_are_refused_with_the_number(tiny: tuple[Any, Path, ModelManifest]) -> None:
    engine = engine_of(tiny)
    for token in (VOCABULARY, -1):
        with pytest.raises(InvalidRequest, match=str(token)):
            engine.engine.submit(greedy("bad", [3, token], 2))
    engine.close()


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(tiny: tuple[Any, Path, ModelManifest]) -> None:
    engine = engine_of(tiny)
    with pytest.raises(InvalidRequest, match="256"):
        engine.engine.submit(greedy("long", [3] * 256, 2))
    engine.close()
    small = engine_of(tiny, memory_bytes=engine.engine.ready.page_bytes * 4)
    with pytest.raises(InvalidRequest, match="4"):
        small.engine.submit(greedy("long", [3] * 70, 2))
    small.close()


def test_an_unknown_adapter_is_refused(tiny: tuple[Any, Path, ModelManifest]) -> None:
    engine = engine_of(tiny)
    with pytest.raises(NotFound):
        engine.engine.submit(greedy("who", [3], 2, AdapterDigest("f" * 64)))
    engine.close()


def test_a_pool_too_small_to_serve_is_a_configuration_error(tiny: tuple[Any, Path, ModelManifest]) -> None:
    with pytest.raises(ConfigurationError, match="raise the memory budget"):
        engine_of(tiny, memory_bytes=1000)


def test_a_model_whose_tensors_do_not_match_lists_them(tiny: tuple[Any, Path, ModelManifest], tmp_path: Path) -> None:
    for file in tiny[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(ModelRejected, match=r"missing: .*model\.layers\.3\.mlp\.down_proj\.weight"):
        LocalEngine(tmp_path, tiny[2])


def test_aborted_sequences_give_their_pages_back(tiny: tuple[Any, Path, ModelManifest]) -> None:
    engine = engine_of(tiny)
    for i in range(6):
        engine.submit(f"r{i}", greedy(f"r{i}", random_prompts(i)[2], 100))
    for _ in range(5):
        engine.step()
    for i in range(6):
        engine.engine.abort(RequestId(f"r{i}"))
    engine.run()
    stats = engine.engine.stats()
    assert stats.pages_kv_in_use == 0
    assert stats.num_running == stats.num_waiting == 0
    engine.close()


def test_page_accounts_are_checked_when_the_engine_becomes_idle_and_not_too_often(
    tiny: tuple[Any, Path, ModelManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[float] = []
    clock = ManualClock()
    monkeypatch.setattr(Scheduler, "check_integrity", lambda self: checks.append(clock.monotonic_s()))
    engine = LocalEngine(tiny[1], tiny[2], clock)
    for i, gap_s in enumerate([1.0, 1.0, CHECK_INTERVAL_S, 1.0]):
        clock.advance(gap_s)
        engine.submit(f"r{i}", greedy(f"r{i}", [3, 4], 3))
        engine.step()
        assert not checks or checks[-1] < clock.monotonic_s(), "not while a sequence is open"
        engine.run()
        engine.step()
    assert checks == [1.0, 2.0 + CHECK_INTERVAL_S]
    engine.close()


def test_an_engine_whose_page_accounts_are_wrong_ends_when_it_becomes_idle(
    tiny: tuple[Any, Path, ModelManifest],
) -> None:
    engine = engine_of(tiny)
    engine.submit("r", greedy("r", [3, 4], 3))
    engine.step()
    assert engine.engine._scheduler._memory.pool.allocate(1) is not None
    with pytest.raises(InternalError, match="holders"):
        engine.run()
    engine.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused_for_that_reason(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot be used: PyTorch .* finds 0 CUDA GPUs"):
        CudaDevice(name)


def test_an_engine_that_closes_does_not_carry_out_the_loads_that_wait(tmp_path: Path) -> None:
    begun: list[object] = []
    may_go_on = threading.Event()

    class Disk(AdapterSources):
        def bring(self, manifest: AdapterManifest, path: Path, load: Any) -> Any:
            begun.append(path)
            may_go_on.wait(10)
            raise OSError("the disk is gone")

    pool = HostMemory(16, 4096, torch.bfloat16)
    memory = AdapterMemory(pool, Disk(pool.pace, SystemClock()), 2, lambda: None, ManualClock())
    for i in range(5):
        memory.start_load(AdapterLoad(make_manifest(f"a{i}"), f"/nowhere/{i}", (i,)))
    while not begun:
        time.sleep(0.001)
    threading.Timer(0.05, may_go_on.set).start()
    memory.close()
    pool.close()
    assert begun == [Path("/nowhere/0")]


def test_a_load_says_how_long_it_waited_for_the_one_before_and_how_long_it_took() -> None:
    clock = ManualClock()
    all_are_asked_for = threading.Event()

    class Disk(AdapterSources):
        def bring(self, manifest: AdapterManifest, path: Path, load: Any) -> Any:
            all_are_asked_for.wait(10)
            clock.advance(2.0)
            raise OSError("the disk is gone")

    pool = HostMemory(16, 4096, torch.bfloat16)
    has_ended = threading.Semaphore(0)
    memory = AdapterMemory(pool, Disk(pool.pace, clock), 2, has_ended.release, clock)
    for name in ("first", "second"):
        memory.start_load(AdapterLoad(make_manifest(name), "/nowhere", (0,)))
    all_are_asked_for.set()
    assert has_ended.acquire(timeout=10) and has_ended.acquire(timeout=10)
    assert [outcome.timing for outcome in memory.finished()] == [LoadTiming(0.0, 2.0), LoadTiming(2.0, 2.0)]
    memory.close()
    pool.close()
