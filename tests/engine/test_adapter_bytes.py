"""Adapter bytes lie in the page pool and nowhere else: by the kernel's account of this process's memory."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rekindle.engine.adapters import ResidentAdapter
from rekindle.engine.kernels.interface import LORA_FIELDS, RANK_FIELD
from rekindle.units import MIB
from support.engines import LocalEngine, greedy
from support.oracle import random_prompts
from support.tiny_home import ALL_LINEAR, TinyHome

pytest.importorskip("peft")

POOL_FILE = "rekindle-pages"
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ (\S+) \S+ \S+ *(.*)$")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    return TinyHome(tmp_path_factory.mktemp("bytes"))


def anonymous_bytes() -> int:
    """Memory of this process that no file holds: heap, stacks, everything private that was written."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(re.search(r"^Anonymous: +(\d+) kB", rollup, re.MULTILINE)[1])  # type: ignore[index]


def pool_ranges() -> list[tuple[int, int]]:
    """Address ranges of this process that map a page pool's file."""
    matches = [_MAPPING.match(line) for line in Path("/proc/self/maps").read_text().splitlines()]
    return [(int(match[1], 16), int(match[2], 16)) for match in matches if match and POOL_FILE in match[4]]


def is_in_pool(start: int, num_bytes: int, ranges: list[tuple[int, int]]) -> bool:
    """Whether every byte is mapped from a pool; a matrix over scattered pages spans several mappings."""
    end = start + num_bytes
    for low, high in sorted(ranges):
        if low <= start < high:
            start = min(end, high)
    return start == end


def matrices(adapter: ResidentAdapter) -> Iterator[tuple[int, int]]:
    """Address and bytes of every matrix of a resident adapter, as kernels and the runner find them."""
    vector = adapter.matrices.vector
    assert vector is not None
    start, size = vector.data_ptr(), vector.element_size()
    entries = [entry for entry in adapter.matrices.table_LPF.reshape(-1, LORA_FIELDS).tolist() if entry[RANK_FIELD]]
    in_layers = [binding for binding in adapter.manifest.bindings if binding.projection != "embed_tokens"]
    for binding, (a_offset, b_offset, rank, _) in zip(in_layers, entries, strict=True):
        yield start + a_offset * size, rank * binding.in_features * size
        yield start + b_offset * size, rank * binding.out_features * size
    if (binding := adapter.embedding) is not None:
        yield start + binding.a_offset * size, binding.rank * binding.in_features * size
        yield start + binding.b_offset * size, binding.rank * binding.out_features * size
    for matrix in (adapter.replaced_embedding, adapter.replaced_head):
        if matrix is not None:
            yield start + matrix.offset * size, matrix.rows * matrix.columns * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_that_come_and_go_leave_nothing_outside_the_pool(tiny: TinyHome, dtype: str) -> None:
    """In bfloat16 the files, which are float32, are converted on the way; that takes one buffer of 4 MiB."""
    names = [f"large-{i}" for i in range(8)]
    adapters = [tiny.adapter(name, rank=1536) for name in names]
    engine = tiny.engine(*names, memory_bytes=160 * MIB, dtype=dtype)
    element_bytes = 4 if dtype == "float32" else 2
    prompt = random_prompts()[1]
    engine.run([greedy("base", prompt, 4), greedy("warm-up", prompt, 4, adapters[0].digest)])
    before = anonymous_bytes()
    engine.run([greedy(name, prompt, 4, adapter.digest) for name, adapter in zip(names, adapters, strict=True)])
    loaded_bytes = sum(element_bytes * adapter.manifest.num_elements for adapter in adapters[1:])
    assert len(engine.engine.stats().resident_adapters) == len(names)
    assert loaded_bytes > 48 * MIB
    assert anonymous_bytes() - before < 8 * MIB
    ranges = pool_ranges()
    for adapter in adapters:
        resident = engine.engine._adapters.get(adapter.digest)
        places = list(matrices(resident))
        assert len(places) == 2 * 3 * len(ALL_LINEAR)
        assert all(is_in_pool(start, num_bytes, ranges) for start, num_bytes in places)
    for adapter in adapters:
        engine.engine.remove_adapter(adapter.digest)
    engine.step()
    assert engine.engine.stats().pages_adapter == 0
    engine.close()


def test_heads_and_embeddings_lie_in_the_pool_too(tiny: TinyHome) -> None:
    adapter = tiny.adapter("ends", targets=["lm_head", "embed_tokens"])
    engine = tiny.engine("ends")
    engine.run([greedy("r", random_prompts()[1], 2, adapter.digest)])
    resident = engine.engine._adapters.get(adapter.digest)
    assert resident.embedding is not None
    ranges = pool_ranges()
    places = list(matrices(resident))
    assert len(places) == 4
    assert all(is_in_pool(start, num_bytes, ranges) for start, num_bytes in places)
    engine.close()


def test_memory_outside_the_pool_would_be_noticed() -> None:
    before = anonymous_bytes()
    tensor = torch.ones(64 * MIB // 4)  # too large to come from what was freed before
    assert anonymous_bytes() - before > 32 * MIB
    assert not is_in_pool(tensor.data_ptr(), tensor.nbytes, pool_ranges())


def test_scattered_pages_are_still_one_vector_in_the_pool(tiny: TinyHome) -> None:
    names = [f"part-{i}" for i in range(4)]
    for i, name in enumerate(names):
        tiny.adapter(name, rank=8 * (i + 1))
    engine: LocalEngine = tiny.engine(*names[:3], memory_bytes=2 * MIB)
    prompt = random_prompts()[1]
    engine.run([greedy(name, prompt, 2, tiny.adapter(name).digest) for name in names[:3]])
    engine.engine.remove_adapter(tiny.adapter("part-1").digest)
    engine.step()
    digest = tiny.register(engine, "part-3")
    output = engine.run([greedy("last", prompt, 8, digest)])["last"]
    assert output.token_ids == tiny.answer("part-3", prompt, 8)
    ranges = pool_ranges()
    assert all(is_in_pool(*place, ranges) for place in matrices(engine.engine._adapters.get(digest)))
    engine.close()
