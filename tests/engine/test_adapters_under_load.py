"""Many adapters in little memory, on a real engine: whatever comes and goes, every output is the one adapter's own."""

import random
import time
from pathlib import Path

import pytest

from rekindle.engine.scheduler.admission import MAX_OVERTAKEN
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.identity import RequestId
from support.engines import LocalEngine, greedy
from support.oracle import random_prompts
from support.tiny_home import TinyHome

pytest.importorskip("peft")

PAGE_TOKENS = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    return TinyHome(tmp_path_factory.mktemp("load"))


@pytest.fixture(scope="module")
def page_bytes(tiny: TinyHome) -> int:
    engine = tiny.engine()
    engine.close()
    return engine.engine.ready.page_bytes


def pages_of(tiny: TinyHome, name: str, page_bytes: int) -> int:
    return -(-tiny.adapter(name).num_bytes // page_bytes)


def num_mapped() -> int:
    """Mappings of page pools in this process, as the kernel counts them."""
    return Path("/proc/self/maps").read_text().count("rekindle-pages")


def check_nothing_is_held(engine: LocalEngine) -> None:
    stats = engine.engine.stats()
    engine.engine._scheduler.check_integrity()
    assert stats.num_running == stats.num_waiting == stats.pages_kv_in_use == 0
    assert stats.pages_free + stats.pages_prefix_cache + stats.pages_adapter == stats.pages_total


class FourStreams:
    """Four long sequences that decode all the time, each begun anew when it has ended: two share an adapter, two run on
    the base."""

    num_tokens = 200

    def __init__(self, tiny: TinyHome, engine: LocalEngine) -> None:
        self._tiny, self._engine = tiny, engine
        self._names: list[str | None] = ["resident", None, "resident", None]
        self._prompts = [random_prompts(seed=40 + i)[1] for i in range(4)]
        self._num_begun = [0] * 4

    def go_on(self) -> None:
        for i, name in enumerate(self._names):
            latest = self._engine.outputs.get(f"long-{i}-{self._num_begun[i] - 1}")
            if latest is None or latest.finish_reason is not None:
                key = f"long-{i}-{self._num_begun[i]}"
                digest = self._tiny.adapter(name).digest if name else None
                self._engine.submit(key, greedy(key, self._prompts[i], self.num_tokens, digest))
                self._num_begun[i] += 1

    def check(self) -> None:
        for i, name in enumerate(self._names):
            expected = self._tiny.answer(name, self._prompts[i], self.num_tokens)
            for turn in range(self._num_begun[i]):
                assert self._engine.outputs[f"long-{i}-{turn}"].token_ids == expected


@pytest.mark.parametrize("num_rounds", [24, pytest.param(2000, marks=pytest.mark.soak)])
def test_adapters_come_and_go_in_memory_for_two_while_four_sequences_decode(
    tiny: TinyHome, page_bytes: int, num_rounds: int
) -> None:
    coming = [f"coming-{i}" for i in range(5)]
    for name in ("resident", *coming):
        tiny.adapter(name, rank=96)
    num_adapter_pages = pages_of(tiny, "resident", page_bytes)
    num_kv_pages = 4 * (-(-(5 + FourStreams.num_tokens) // PAGE_TOKENS)) + 10
    assert num_kv_pages < num_adapter_pages
    engine = tiny.engine("resident", memory_bytes=(2 * num_adapter_pages + num_kv_pages) * page_bytes)
    mapped_before = num_mapped()
    streams = FourStreams(tiny, engine)
    prompt, draw = random_prompts(seed=44)[1], random.Random(0)
    for i in range(num_rounds):
        streams.go_on()
        digest = tiny.register(engine, coming[i % len(coming)])
        engine.submit(f"short-{i}", greedy(f"short-{i}", prompt, 6, digest))
        for _ in range(draw.randrange(8)):
            engine.step()
        engine.engine.remove_adapter(digest)
        if i % 4 == 3:
            engine.engine.abort(RequestId(f"short-{i}"))
        while engine.outputs[f"short-{i}"].finish_reason is None:
            engine.step()
            engine.await_loads()
        engine.engine._scheduler.check_integrity()
    engine.run()
    streams.check()
    for i in range(num_rounds):
        output = engine.outputs[f"short-{i}"]
        was_aborted = output.finish_reason is FinishReason.ABORT
        assert output.finish_reason is FinishReason.LENGTH or (was_aborted and i % 4 == 3)
        expected = tiny.answer(coming[i % len(coming)], prompt, 6)
        assert output.token_ids == (expected[: len(output.token_ids)] if was_aborted else expected)
    check_nothing_is_held(engine)
    engine.engine.remove_adapter(tiny.adapter("resident").digest)
    engine.step()
    assert engine.engine.stats().pages_adapter == 0
    assert engine.engine.stats().resident_adapters == ()
    unmapped_by_s = time.monotonic() + 10
    while num_mapped() != mapped_before and time.monotonic() < unmapped_by_s:  # the adapters' reader unmaps
        time.sleep(0.01)
    assert num_mapped() == mapped_before
    engine.close()


@pytest.mark.parametrize("num_each", [6, pytest.param(400, marks=pytest.mark.soak)])
def test_a_working_set_of_four_times_the_memory_is_served_rightly(
    tiny: TinyHome, page_bytes: int, num_each: int
) -> None:
    num_resident, num_adapters = 4, 16
    names = [f"thrash-{i}" for i in range(num_adapters)]
    for name in names:
        tiny.adapter(name, rank=32)
    num_pages = num_resident * pages_of(tiny, names[0], page_bytes) + 24
    engine = tiny.engine(*names, memory_bytes=num_pages * page_bytes, max_queued=num_each * num_adapters)
    prompts = [random_prompts(seed=60 + i)[1] for i in range(2)]
    order = [name for _ in range(num_each) for name in names]
    random.Random(1).shuffle(order)
    for i, name in enumerate(order):
        engine.submit(f"r{i}", greedy(f"r{i}", prompts[i % 2], 8, tiny.adapter(name).digest))
    while not all(output.finish_reason for output in engine.outputs.values()):
        engine.step()
        engine.await_loads()
        assert len(engine.engine.stats().resident_adapters) <= num_resident
    for i, name in enumerate(order):
        assert engine.outputs[f"r{i}"].token_ids == tiny.answer(name, prompts[i % 2], 8)
    assert engine.engine.stats().adapter_loads_total > 2 * num_adapters
    check_nothing_is_held(engine)
    engine.close()


def test_requests_for_resident_adapters_without_end_do_not_starve_those_for_absent_ones(
    tiny: TinyHome, page_bytes: int
) -> None:
    """The bound of `scheduler.admission`: later arrivals go past one that lacks pages `MAX_OVERTAKEN` times."""
    num_places = 4
    hot, cold = ["thrash-0", "thrash-1"], ["thrash-2", "thrash-3", "thrash-4"]
    for name in (*hot, *cold):
        tiny.adapter(name, rank=32)
    num_pages = 2 * pages_of(tiny, "thrash-0", page_bytes) + 20
    engine = tiny.engine(*hot, *cold, memory_bytes=num_pages * page_bytes, max_sequences=num_places)
    prompt = random_prompts(seed=60)[1]
    num_hot = 0

    def ask_for_hot_ones() -> None:
        nonlocal num_hot
        while sum(output.finish_reason is None for name, output in engine.outputs.items() if "hot" in name) < 8:
            digest = tiny.adapter(hot[num_hot % len(hot)]).digest
            engine.submit(f"hot-{num_hot}", greedy(f"hot-{num_hot}", prompt, 5 + num_hot % 4, digest))
            num_hot += 1

    ask_for_hot_ones()
    while num_begun(engine, "hot") < num_places:
        engine.step()
    for name in cold:
        engine.submit(name, greedy(name, prompt, 6, tiny.adapter(name).digest))
    num_earlier = num_hot
    while not all(engine.outputs[name].token_ids for name in cold):
        ask_for_hot_ones()
        engine.step()
        engine.await_loads()
        num_overtaking = sum(bool(engine.outputs[f"hot-{i}"].token_ids) for i in range(num_earlier, num_hot))
        assert num_overtaking <= MAX_OVERTAKEN + num_places
    outputs = engine.run()
    for name in cold:
        assert outputs[name].token_ids == tiny.answer(name, prompt, 6)
    for i in range(num_hot):
        assert outputs[f"hot-{i}"].token_ids == tiny.answer(hot[i % len(hot)], prompt, 5 + i % 4)
    check_nothing_is_held(engine)
    engine.close()


def test_rank_256_follows_rank_8_without_a_restart(tiny: TinyHome) -> None:
    prompt = random_prompts(seed=70)[2]
    tiny.adapter("rank-8", rank=8)
    tiny.adapter("rank-256", rank=256)
    engine = tiny.engine("rank-8", memory_bytes=16 << 20)
    assert engine.run([greedy("small", prompt, 12, tiny.adapter("rank-8").digest)])
    tiny.register(engine, "rank-256")
    engine.run([greedy("large", prompt, 12, tiny.adapter("rank-256").digest)])
    engine.run([greedy(f"both-{name}", prompt, 12, tiny.adapter(name).digest) for name in ("rank-8", "rank-256")])
    for key, name in (("small", "rank-8"), ("large", "rank-256"), ("both-rank-8", "rank-8")):
        assert engine.outputs[key].token_ids == tiny.answer(name, prompt, 12)
    assert engine.outputs["both-rank-256"].token_ids == tiny.answer("rank-256", prompt, 12)
    assert tiny.adapter("rank-256").num_bytes >= 32 * tiny.adapter("rank-8").num_bytes
    engine.close()


def test_no_adapter_and_no_version_meets_keys_and_values_of_another(tiny: TinyHome) -> None:
    """A version is a digest to the engine, so two versions of one name are two adapters here."""
    prompt = random_prompts(seed=80)[3]
    names: list[str | None] = ["version-1", "version-2", None]
    for name in ("version-1", "version-2"):
        tiny.adapter(name)
    engine = tiny.engine("version-1", "version-2")
    whole_pages = (len(prompt) - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert whole_pages > 0
    hits = 0
    for turn in range(2):
        for name in names:
            key = f"{name}-{turn}"
            output = engine.run([greedy(key, prompt, 6, tiny.adapter(name).digest if name else None)])[key]
            assert output.token_ids == tiny.answer(name, prompt, 6)
            hits += whole_pages * turn
            assert output.cached_tokens == whole_pages * turn
            assert engine.engine.stats().prefix_hits_total == hits
    engine.close()


@pytest.mark.parametrize("is_resident", [True, False])
def test_a_busy_adapter_delays_anothers_single_request_by_one_request_of_its_queue(
    tiny: TinyHome, *, is_resident: bool
) -> None:
    """The bound of `scheduler.fairness`, counted in the engine's own steps. An adapter that must be loaded first may
    see the places pass by that come free before its bytes are there: one more request of the busy one for each."""
    num_places, num_tokens = 4, 10
    prompt = random_prompts(seed=90)[1]
    tiny.adapter("busy")
    tiny.adapter("single")
    engine = tiny.engine("busy", "single", max_sequences=num_places)
    if is_resident:
        engine.run([greedy("warm-up", prompt, 1, tiny.adapter("single").digest)])
    for i in range(64):
        engine.submit(f"busy-{i}", greedy(f"busy-{i}", prompt, num_tokens, tiny.adapter("busy").digest))
    while engine.engine.stats().num_running < num_places:
        engine.step()
    for _ in range(num_tokens // 2):
        engine.step()
    num_begun_before = num_begun(engine, "busy")
    steps_before = engine.engine.stats().steps_total
    engine.submit("single", greedy("single", prompt, num_tokens, tiny.adapter("single").digest))
    while not engine.outputs["single"].token_ids:
        num_overtaking = num_begun(engine, "busy") - num_begun_before
        engine.step()
        engine.await_loads()
    num_steps = engine.engine.stats().steps_total - steps_before
    assert num_overtaking <= (1 if is_resident else 1 + num_places)
    assert num_steps <= (2 if is_resident else 3) * (num_tokens + 1)
    outputs = engine.run()
    assert outputs["single"].token_ids == tiny.answer("single", prompt, num_tokens)
    assert all(outputs[f"busy-{i}"].token_ids == tiny.answer("busy", prompt, num_tokens) for i in range(64))
    engine.close()


def num_begun(engine: LocalEngine, prefix: str) -> int:
    return sum(name.startswith(prefix) and bool(output.token_ids) for name, output in engine.outputs.items())
