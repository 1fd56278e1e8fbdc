"""The page pool's memory and its mappings."""

import errno
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rekindle.engine import memory
from rekindle.engine.kernels.interface import AttentionShape
from rekindle.engine.memory import PagePool, page_bytes_for
from rekindle.errors import ConfigurationError

SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=8, scale=1.0)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 12))
def test_scattered_pages_appear_side_by_side(order: list[int], count: int) -> None:
    pool = PagePool(12, 4096)
    whole = pool.kv(AttentionShape(1, 1, 512, 1.0), 1, 2, torch.float16).kv_PLBCD.view(12, 2048)
    pages = order[:count]
    whole[:] = torch.arange(12, dtype=torch.float16).unsqueeze(1)
    with pool.map_pages(pages) as mapped:
        vector = mapped.tensor(torch.float16, count * 2048, 0).view(count, 2048)
        assert vector[:, 0].tolist() == pages
        vector[count - 1, 2047] = 99.0
        assert whole[pages[-1], 2047] == 99.0
        del vector
    pool.close()


def test_a_page_holds_all_layers_of_its_tokens_in_one_piece() -> None:
    page_bytes = page_bytes_for(SHAPE, num_layers=3, page_tokens=4, dtype=torch.float32)
    assert page_bytes % mmap.PAGESIZE == 0
    pool = PagePool(5, page_bytes)
    kv = pool.kv(SHAPE, 3, 4, torch.float32).kv_PLBCD
    assert kv.shape == (5, 3, 4, 4, 8)
    kv[2] = 7.0
    with pool.map_pages([2]) as mapped:
        payload = 3 * 4 * 4 * 8
        assert bool((mapped.tensor(torch.float32, payload, 0) == 7.0).all())
        assert bool((mapped.tensor(torch.float32, page_bytes // 4 - payload, payload) == 0.0).all())
    assert bool((kv[1] == 0.0).all())
    assert bool((kv[3] == 0.0).all())
    pool.close()


def test_page_sizes_that_cannot_be_mapped_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a multiple"):
        PagePool(4, 1000)


def test_a_pool_that_cannot_be_reserved_says_how_big_it_was() -> None:
    with pytest.raises(ConfigurationError, match="page pool of"):
        PagePool(1 << 50, 4096)


def test_untouched_pages_take_no_memory() -> None:
    def shared_kib() -> int:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssShmem"))

    before = shared_kib()
    pool = PagePool(1 << 18, 4096)
    assert shared_kib() - before < 1024
    pool.close()


def test_adjacent_pages_are_seen_where_they_lie() -> None:
    pool = PagePool(8, 4096)
    whole = pool.kv(AttentionShape(1, 1, 512, 1.0), 1, 2, torch.float16).kv_PLBCD.view(8, 2048)
    whole[:] = torch.arange(8, dtype=torch.float16).unsqueeze(1)
    with pool.map_pages([3, 4, 5]) as pages:
        vector = pages.tensor(torch.float16, 3 * 2048, 0)
        assert vector.data_ptr() == whole[3].data_ptr()
        assert vector.view(3, 2048)[:, 5].tolist() == [3, 4, 5]
    assert whole[4, 0] == 4
    pool.close()


def test_a_mapping_that_fails_half_way_leaves_nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_mappings() -> int:
        return Path("/proc/self/maps").read_text().count("rekindle-pages")

    pool = PagePool(16, 4096)
    before = num_mappings()
    map_piece, num_calls = memory._mmap, 0

    def limited(*arguments: Any) -> int:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            raise OSError(errno.ENOMEM, "too many mappings")
        return map_piece(*arguments)

    monkeypatch.setattr(memory, "_mmap", limited)
    with pytest.raises(OSError, match="too many"):
        pool.map_pages([0, 2, 4, 6])
    assert num_mappings() == before
    pool.close()
