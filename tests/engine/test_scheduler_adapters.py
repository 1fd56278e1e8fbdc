from dataclasses import replace

import pytest

from rekindle.engine.scheduler.scheduler import Scheduler
from rekindle.errors import (
    AdapterRejected,
    InternalError,
    NotFound,
)
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.identity import AdapterDigest, ModelDigest, RequestId
from support.scheduling import Replica, make_config, make_manifest, make_request


def planned_names(plan):
    return [planned.request.request_id for planned in plan.sequences]


def test_an_adapter_is_loaded_once_for_all_who_wait_for_it_and_others_go_on():
    replica = Replica(make_config())
    replica.scheduler.add_adapter(make_manifest("x", num_pages=3))
    replica.submit(make_request("a", adapter="x"))
    replica.submit(make_request("b", adapter="x"))
    replica.submit(make_request("base"))
    plan = replica.step()
    assert [(load.manifest.digest, len(load.pages)) for load in plan.loads] == [("x", 3)]
    assert planned_names(plan) == ["base"]
    plan = replica.step()
    assert (planned_names(plan), plan.loads) == (["base"], ())
    replica.end_load(AdapterDigest("x"))
    assert planned_names(replica.step()) == ["base", "a", "b"]
    replica.run()
    assert replica.scheduler.stats().resident_adapters == ("x",)
    assert replica.scheduler.stats().adapter_loads_total == 1
    for name in ("a", "b", "base"):
        replica.check_stream(RequestId(name))


def test_nothing_is_runnable_while_all_wait_for_a_load():
    replica = Replica(make_config())
    replica.scheduler.add_adapter(make_manifest("x"))
    assert not replica.scheduler.has_work
    replica.submit(make_request("a", adapter="x"))
    assert replica.scheduler.has_runnable
    replica.step()
    assert replica.scheduler.has_work
    assert not replica.scheduler.has_runnable
    replica.end_load(AdapterDigest("x"))
    assert replica.scheduler.has_runnable


def test_a_failed_load_ends_those_who_wait_with_the_message_and_may_be_tried_again():
    replica = Replica(make_config())
    replica.scheduler.add_adapter(make_manifest("x"))
    replica.submit(make_request("a", adapter="x"))
    replica.submit(make_request("base"))
    replica.step()
    replica.end_load(AdapterDigest("x"), error="the file is gone")
    (chunk,) = replica.chunks[RequestId("a")]
    assert (chunk.finish_reason, chunk.error) == (FinishReason.ERROR, "the file is gone")
    assert replica.scheduler.stats().pages_adapter == 0
    replica.submit(make_request("b", adapter="x"))
    replica.run()
    replica.check_stream(RequestId("b"))


def test_the_end_of_a_load_nobody_began_is_a_reported_bug():
    scheduler = Scheduler(make_config())
    scheduler.add_adapter(make_manifest("x"))
    reports = (lambda it: scheduler.adapter_loaded(it, 1.0), lambda it: scheduler.adapter_failed(it, "no", 1.0))
    for report in reports:
        for digest in ("x", "ghost"):
            with pytest.raises(InternalError, match=f"load of adapter {digest} was reported, but none is under way"):
                report(AdapterDigest(digest))


def test_the_adapter_used_longest_ago_is_evicted_when_pages_are_needed():
    replica = Replica(make_config(num_pages=10))
    for name in ("x", "y", "z"):
        replica.scheduler.add_adapter(make_manifest(name, num_pages=4))
        replica.submit(make_request(name, 3, max_tokens=1, adapter=name))
        replica.run()
    assert [plan.evicted for plan in replica.plans if plan.evicted] == [("x",)]
    assert replica.scheduler.stats().resident_adapters == ("y", "z")


def test_an_adapter_in_use_is_never_evicted():
    replica = Replica(make_config(num_pages=9))
    for name in ("x", "y"):
        replica.scheduler.add_adapter(make_manifest(name, num_pages=4))
    replica.submit(make_request("a", 3, max_tokens=12, adapter="x"))
    replica.step()
    replica.end_all_loads()
    replica.submit(make_request("b", 3, max_tokens=2, adapter="y"))
    replica.run()
    assert replica.finish_reason("a") is FinishReason.LENGTH
    loads = [index for index, plan in enumerate(replica.plans) if plan.loads]
    steps_of_a = [index for index, plan in enumerate(replica.plans) if "a" in planned_names(plan)]
    assert len(loads) == 2
    assert loads[0] < steps_of_a[0] < steps_of_a[-1] < loads[1]


def test_a_removed_version_serves_those_who_began_with_it_and_is_then_forgotten():
    replica = Replica(make_config())
    replica.scheduler.add_adapter(make_manifest("x", num_pages=2))
    replica.submit(make_request("a", adapter="x"))
    replica.step()
    replica.end_all_loads()
    replica.step()
    replica.scheduler.remove_adapter(AdapterDigest("x"))
    with pytest.raises(NotFound, match="adapter version x is removed"):
        replica.submit(make_request("b", adapter="x"))
    replica.run()
    replica.check_stream(RequestId("a"))
    assert replica.step().evicted == ("x",)
    assert replica.scheduler.stats().pages_adapter == 0
    with pytest.raises(NotFound, match="adapter version x is unknown here"):
        replica.submit(make_request("c", adapter="x"))


def test_a_version_removed_while_it_loads_is_forgotten_when_the_load_ends():
    replica = Replica(make_config())
    replica.scheduler.add_adapter(make_manifest("x", num_pages=2))
    replica.submit(make_request("a", adapter="x"))
    replica.step()
    replica.scheduler.remove_adapter(AdapterDigest("x"))
    replica.abort(RequestId("a"))
    assert replica.scheduler.stats().pages_adapter == 2
    replica.end_all_loads()
    assert replica.scheduler.stats().pages_adapter == 0
    replica.scheduler.check_integrity()
    assert replica.step().evicted == ("x",)


def test_a_removed_version_is_kept_until_the_last_step_in_flight_with_it_is_committed():
    replica = Replica(make_config(), depth=2)
    replica.scheduler.add_adapter(make_manifest("x", num_pages=2))
    replica.submit(make_request("a", adapter="x"))
    replica.schedule()
    replica.end_all_loads()
    replica.schedule()
    replica.abort(RequestId("a"))
    replica.scheduler.remove_adapter(AdapterDigest("x"))
    assert replica.scheduler.stats().resident_adapters == ("x",)
    replica.drain()
    assert replica.scheduler.stats().resident_adapters == ()


def test_a_sequence_whose_adapter_is_evicted_again_and_again_is_not_starved():
    replica = Replica(make_config(num_pages=14, max_sequences=4))
    replica.scheduler.add_adapter(make_manifest("x", num_pages=7))
    replica.submit(make_request("victim", 20, max_tokens=2, adapter="x"))
    for number in range(600):
        replica.submit(make_request(f"base-{number}", 8, max_tokens=9))
    for step in range(4000):
        if replica.output("victim"):
            break
        replica.step()
        if step % 3 == 0:
            replica.end_all_loads()
    started = {name for plan in replica.plans for name in planned_names(plan)}
    assert len(started) < 100


def test_a_version_added_again_after_its_removal_is_served_again():
    replica = Replica(make_config())
    replica.scheduler.add_adapter(make_manifest("x"))
    replica.submit(make_request("a", adapter="x"))
    replica.scheduler.remove_adapter(AdapterDigest("x"))
    replica.scheduler.add_adapter(make_manifest("x"))
    replica.submit(make_request("b", adapter="x"))
    replica.run()
    replica.check_stream(RequestId("b"))


def test_an_adapter_of_another_base_is_refused():
    manifest = replace(make_manifest("x"), base=ModelDigest("other"))
    with pytest.raises(AdapterRejected, match="made for base other, but this replica serves base"):
        Scheduler(make_config()).add_adapter(manifest)


def test_an_adapter_takes_whole_pages_of_its_true_size():
    replica = Replica(make_config())
    replica.scheduler.add_adapter(replace(make_manifest("x"), num_elements=65))
    replica.submit(make_request("a", adapter="x"))
    (load,) = replica.step().loads
    assert len(load.pages) == 3
