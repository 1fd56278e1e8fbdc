"""What a replica reports: where every byte of its pool is, and what it has loaded, evicted and refused."""

from dataclasses import astuple, replace

import pytest

from rekindle.errors import ConfigurationError, Overloaded
from rekindle.protocol.identity import AdapterDigest
from support.scheduling import PAGE_BYTES, PAGE_TOKENS, TOKEN_BYTES, Replica, make_config, make_manifest, make_request

PADDING = PAGE_BYTES - PAGE_TOKENS * TOKEN_BYTES


def test_every_byte_of_the_pool_is_accounted_for_by_its_use():
    replica = Replica(make_config(num_pages=20))
    replica.scheduler.add_adapter(replace(make_manifest("x"), num_elements=PAGE_BYTES + 3))
    replica.submit(make_request("a", 6, max_tokens=8, adapter="x"))
    replica.step()
    report = replica.scheduler.stats().pool_bytes
    assert (report.adapters_loading, report.waste_adapter_tails) == (2 * PAGE_BYTES + 6, PAGE_BYTES - 6)
    assert report.free == 17 * PAGE_BYTES
    replica.end_all_loads()
    replica.step()
    report = replica.scheduler.stats().pool_bytes
    assert (report.adapters_in_use, report.adapters_loading, report.adapters_idle) == (2 * PAGE_BYTES + 6, 0, 0)
    assert (report.kv_in_use, report.waste_kv_tails) == (7 * TOKEN_BYTES, TOKEN_BYTES)
    assert report.waste_padding == 2 * PADDING
    replica.run()
    report = replica.scheduler.stats().pool_bytes
    assert (report.adapters_in_use, report.adapters_idle) == (0, 2 * PAGE_BYTES + 6)
    assert (report.kv_in_use, report.waste_kv_tails) == (0, 0)
    assert report.prefix_cache == replica.scheduler.stats().pages_prefix_cache * PAGE_TOKENS * TOKEN_BYTES > 0
    assert sum(astuple(report)) == 20 * PAGE_BYTES


def test_a_page_that_several_sequences_share_counts_once():
    replica = Replica(make_config(num_pages=20))
    prompt = tuple(range(9))
    replica.submit(make_request("a", prompt, max_tokens=20))
    replica.step()
    replica.submit(make_request("b", prompt, max_tokens=20))
    replica.step()
    stats = replica.scheduler.stats()
    assert stats.prefix_hits_total == 8
    assert stats.pages_kv_in_use == 4
    assert stats.pool_bytes.kv_in_use + stats.pool_bytes.waste_kv_tails == 4 * PAGE_TOKENS * TOKEN_BYTES


def test_the_seconds_of_loads_that_follow_one_another_are_counted_once():
    replica = Replica(make_config())
    for name in ("x", "y"):
        replica.scheduler.add_adapter(make_manifest(name))
        replica.submit(make_request(name, adapter=name))
    replica.step()
    assert replica.scheduler.stats().num_adapter_loads == 2
    began_s = replica.now_s
    for name, duration_s in (("x", 2.0), ("y", 3.0)):
        replica.now_s += duration_s
        replica.end_load(AdapterDigest(name))
    stats = replica.scheduler.stats()
    assert (stats.num_adapter_loads, stats.adapter_loads_total) == (0, 2)
    assert stats.adapter_load_s_total == pytest.approx(replica.now_s - began_s)


def test_evictions_that_make_room_are_counted_and_removals_are_not():
    replica = Replica(make_config(num_pages=8))
    for name in ("x", "y"):
        replica.scheduler.add_adapter(make_manifest(name, num_pages=5))
        replica.submit(make_request(name, 5, max_tokens=1, adapter=name))
        replica.run()
    replica.scheduler.remove_adapter(AdapterDigest("y"))
    replica.submit(make_request("long", 30, max_tokens=1))
    replica.run()
    stats = replica.scheduler.stats()
    assert (stats.adapter_evictions_total, stats.prefix_evictions_total) == (1, 2)


def test_requests_that_a_full_queue_turns_away_are_counted():
    replica = Replica(make_config(max_queued=1))
    replica.submit(make_request("a"))
    for name in ("b", "c"):
        with pytest.raises(Overloaded):
            replica.submit(make_request(name))
    assert replica.scheduler.stats().refused_full_total == 2


def test_requests_whose_first_token_cannot_come_in_time_are_counted():
    replica = Replica(make_config(max_sequences=1))
    replica.submit(make_request("running", 5, max_tokens=50))
    replica.step()
    replica.submit(make_request("late", ttft_slo_s=0.001))
    replica.collect(replica.scheduler.refuse_late(replica.now_s))
    assert replica.scheduler.stats().refused_late_total == 1


def test_tokens_that_do_not_fit_into_a_page_are_a_configuration_error():
    with pytest.raises(ConfigurationError, match="4 tokens of 17 bytes do not fit into page_bytes = 64"):
        replace(make_config(), token_bytes=17)
