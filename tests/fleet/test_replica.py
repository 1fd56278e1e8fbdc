"""A replica in ordinary life: streams, refusals, aborts, slow readers, draining, and leaving nothing behind."""

import asyncio
import os
import select
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from rekindle.clock import SystemClock
from rekindle.errors import (
    AdapterRejected,
    ConfigurationError,
    Conflict,
    EngineFailed,
    InternalError,
    InvalidRequest,
    Overloaded,
    ReplicaUnavailable,
)
from rekindle.fleet.launch import CommandLauncher
from rekindle.fleet.replica import Replica
from rekindle.fleet.state import ReplicaState
from rekindle.protocol.generation import FinishReason
from rekindle.protocol.identity import ModelDigest
from rekindle.testing.fake_engine import Faults, expected_tokens, fake_engine_command
from support.replicas import (
    ADAPTER,
    QUICK,
    begin,
    collect,
    engine_settings,
    request,
    running,
    tokens_of,
    until,
)

SLOW = Faults(step_s=0.01)
ENDLESS = 100_000


async def test_a_stream_is_what_the_engine_generates() -> None:
    async with running() as replica:
        wanted = request("r", logprobs=2, prompt_logprobs=0)
        chunks = await collect(replica, wanted)
        assert tokens_of(chunks) == expected_tokens(wanted)
        assert chunks[-1].finish_reason is FinishReason.LENGTH
        assert sum(len(chunk.logprobs or ()) for chunk in chunks) == 40
        assert len(chunks[0].prompt_logprobs or ()) == 3


async def test_a_stop_token_ends_a_stream() -> None:
    wanted = request("r", 100)
    stop = expected_tokens(wanted)[20]
    wanted = request("r", 100, stop_token_ids=(stop,))
    async with running() as replica:
        chunks = await collect(replica, wanted)
    assert tokens_of(chunks) == expected_tokens(wanted)
    assert tokens_of(chunks)[-1] == stop
    assert chunks[-1].finish_reason is FinishReason.STOP


async def test_two_replicas_run_side_by_side() -> None:
    async with running() as one, running() as other:
        assert one.engine_pid != other.engine_pid
        wanted = [request(f"r{i}", 50, (i,)) for i in range(20)]
        streams = [asyncio.create_task(collect(replica, each)) for each in wanted for replica in (one, other)]
        for i, stream in enumerate(streams):
            assert tokens_of(await stream) == expected_tokens(wanted[i // 2])


async def test_closing_a_stream_aborts_its_sequence() -> None:
    async with running(SLOW) as replica:
        stream = replica.generate(request("r", ENDLESS))
        await anext(stream)
        await until(lambda: replica.stats is not None and replica.stats.num_running == 1, "the sequence is reported")
        await stream.aclose()
        await until(lambda: replica.stats is not None and replica.stats.num_running == 0, "the sequence is gone")


async def test_a_cancelled_reader_aborts_its_sequence() -> None:
    async with running(SLOW) as replica:
        reader = asyncio.create_task(collect(replica, request("r", ENDLESS)))
        await until(lambda: replica.stats is not None and replica.stats.num_running == 1, "the sequence is reported")
        reader.cancel()
        await until(lambda: replica.stats is not None and replica.stats.num_running == 0, "the sequence is gone")


async def test_more_requests_than_may_run_and_wait_are_refused_until_one_ends() -> None:
    async with running(SLOW, max_queued=1, max_sequences=2) as replica:
        streams = [replica.generate(request(f"r{i}", ENDLESS)) for i in range(3)]
        readers = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.gather(*readers[:2])
        with pytest.raises(Overloaded, match="3 requests are open") as met:
            await collect(replica, request("late"))
        assert met.value.retry_after_s > 0
        await streams[0].aclose()
        wanted = request("next", 5)
        reader = asyncio.create_task(collect(replica, wanted))
        await streams[1].aclose()
        await readers[2]
        assert tokens_of(await reader) == expected_tokens(wanted)
        await streams[2].aclose()


async def test_a_reader_that_does_not_read_gets_all_tokens_in_one_chunk() -> None:
    async with running() as replica:
        wanted = request("slow", 2000, logprobs=0)
        stream = replica.generate(wanted)
        first = await anext(stream)
        await until(lambda: replica.stats is not None and replica.stats.generated_tokens_total == 2000, "it is done")
        await until(lambda: replica._requests.get(wanted.request_id).is_over, "all has arrived")  # type: ignore[union-attr]
        rest = [chunk async for chunk in stream]
        assert len(rest) == 1
        assert tokens_of([first, *rest]) == expected_tokens(wanted)
        assert len(rest[0].logprobs or ()) == len(rest[0].token_ids)


async def test_a_reader_that_does_not_read_holds_nobody_up() -> None:
    async with running() as replica:
        idle = replica.generate(request("idle", ENDLESS))
        await anext(idle)
        wanted = request("r", 300)
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        await idle.aclose()


async def test_refusals_arrive_as_the_errors_they_are() -> None:
    async with running() as replica:
        with pytest.raises(InvalidRequest, match="no tokens") as met:
            await collect(replica, request("empty", prompt=()))
        assert met.value.field == "prompt"
        with pytest.raises(AdapterRejected, match="was made for base"):
            await replica.add_adapter(replace(ADAPTER, base=ModelDigest("1" * 64)), Path("/nonexistent"))
        stream = replica.generate(request("twin", ENDLESS))
        await anext(stream)
        with pytest.raises(Conflict, match="twin is open already"):
            await collect(replica, request("twin"))
        await stream.aclose()


async def test_a_request_that_cannot_be_sent_fails_alone() -> None:
    async with running() as replica:
        with pytest.raises(InternalError, match="GenerateRequest cannot be sent"):
            await collect(replica, request("big", prompt=(2**64,)))
        wanted = request("r")
        assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
        assert replica.restarts_total == 0


async def test_stopping_fails_what_is_open_and_takes_no_new_requests() -> None:
    async with running(SLOW) as replica:
        stream = await begin(replica, request("open", ENDLESS))
        await replica.stop()
        with pytest.raises(ReplicaUnavailable, match="shutting down"):
            await stream.all()
        with pytest.raises(ReplicaUnavailable, match="shutting down"):
            await collect(replica, request("late"))
        assert replica.state is ReplicaState.STOPPED


@pytest.mark.parametrize("end", ["stop", "crash", "stop while restarting", "stop while starting"])
async def test_a_stopped_replica_leaves_no_process_task_thread_or_descriptor_behind(end: str) -> None:
    def descriptors() -> list[str]:
        return os.listdir("/proc/self/fd")

    threads_before = set(threading.enumerate())
    async with running():
        pass
    await until(lambda: threads_before.issuperset(threading.enumerate()), "no thread is left of the first")
    num_before = len(descriptors())
    replica = Replica(
        engine_settings(), SystemClock(), supervision=QUICK, launcher=CommandLauncher(fake_engine_command(SLOW))
    )
    starting = asyncio.create_task(replica.start())
    if end == "stop while starting":
        await asyncio.sleep(0.01)
        starting.cancel()
        await asyncio.wait([starting])
    else:
        await starting
        pid = replica.engine_pid
        assert pid is not None
        stream = await begin(replica, request("open", ENDLESS))
        if end != "stop":
            os.kill(pid, signal.SIGKILL)
            state = ReplicaState.READY if end == "crash" else ReplicaState.RESTARTING
            await until(lambda: replica.engine_pid != pid and replica.state is state, "the engine is replaced")
        await replica.stop()
        with pytest.raises(ReplicaUnavailable):
            await stream.all()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    await replica.stop()
    assert len(descriptors()) == num_before
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await until(lambda: threads_before.issuperset(threading.enumerate()), "no thread is left")


async def test_settings_that_no_engine_can_start_with_are_a_configuration_error() -> None:
    command = fake_engine_command(Faults(configuration_error="dtype 'int3' is not supported"))
    replica = Replica(engine_settings(), SystemClock(), supervision=QUICK, launcher=CommandLauncher(command))
    with pytest.raises(ConfigurationError, match="int3"):
        await replica.start()
    assert replica.state is ReplicaState.STOPPED


@pytest.mark.parametrize(
    ("command", "start_s", "message"),
    [
        (fake_engine_command(Faults(crash_at_start=True)), 30.0, "was killed by SIGKILL"),
        (("/nonexistent/python",), 30.0, "could not be started"),
        (("sleep", "1000", "#"), 30.0, "exited with status 1"),
        ((sys.executable, "-c", "import time; time.sleep(1000)"), 0.2, "was not ready within 0.2 s"),
    ],
)
async def test_an_engine_that_does_not_start_is_an_error_that_says_why(
    command: tuple[str, ...], start_s: float, message: str
) -> None:
    supervision = replace(QUICK, start_s=start_s)
    replica = Replica(engine_settings(), SystemClock(), supervision=supervision, launcher=CommandLauncher(command))
    with pytest.raises(EngineFailed, match=message):
        await replica.start()
    assert replica.state is ReplicaState.STOPPED


async def test_a_request_that_comes_while_the_first_engine_starts_waits_for_it() -> None:
    replica = Replica(
        engine_settings(), SystemClock(), supervision=QUICK, launcher=CommandLauncher(fake_engine_command())
    )
    starting = asyncio.create_task(replica.start())
    await asyncio.sleep(0)
    wanted = request("early")
    assert replica.state is ReplicaState.STARTING
    assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
    assert await starting == replica.ready
    await replica.stop()


async def test_a_start_that_is_overtaken_by_a_stop_fails() -> None:
    replica = Replica(
        engine_settings(), SystemClock(), supervision=QUICK, launcher=CommandLauncher(fake_engine_command())
    )
    starting = asyncio.create_task(replica.start())
    await asyncio.sleep(0.01)
    await replica.stop()
    with pytest.raises(EngineFailed, match="stopped before its engine was ready"):
        await starting


async def test_stopping_does_not_wait_for_an_engine_that_is_not_ready() -> None:
    stubborn = CommandLauncher((sys.executable, "-c", "import signal; signal.pause()"))
    supervision = replace(QUICK, stop_s=1000.0)
    replica = Replica(engine_settings(), SystemClock(), supervision=supervision, launcher=stubborn)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    num_before = len(children.read_text().split())
    starting = asyncio.create_task(replica.start())
    await until(lambda: len(children.read_text().split()) > num_before, "an engine process")
    async with asyncio.timeout(30):
        await replica.stop()
    with pytest.raises(EngineFailed):
        await starting


async def test_a_request_that_waits_for_an_engine_that_cannot_start_fails() -> None:
    command = fake_engine_command(Faults(crash_at_start=True))
    replica = Replica(engine_settings(), SystemClock(), supervision=QUICK, launcher=CommandLauncher(command))
    starting = asyncio.create_task(replica.start())
    await asyncio.sleep(0)
    with pytest.raises(ReplicaUnavailable):
        await collect(replica, request("early"))
    with pytest.raises(EngineFailed):
        await starting


async def test_a_replica_that_is_not_started_refuses_requests_and_stops_quietly() -> None:
    replica = Replica(engine_settings(), SystemClock(), launcher=CommandLauncher(fake_engine_command()))
    with pytest.raises(ReplicaUnavailable, match="has not been started"):
        await collect(replica, request("early"))
    await replica.stop()
    with pytest.raises(InternalError, match="started once"):
        await replica.start()


PARENT = """
import asyncio
from support.replicas import running

async def main():
    async with running() as replica:
        print(replica.engine_pid, flush=True)
        await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
async def test_a_parent_that_is_killed_leaves_no_engine_behind(how: signal.Signals) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        PARENT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert parent.stdout is not None
    engine = os.pidfd_open(int(await parent.stdout.readline()))
    try:
        parent.send_signal(how)
        await parent.wait()
        exited, _, _ = await asyncio.to_thread(select.select, [engine], [], [], 30.0)
        assert exited
    finally:
        os.close(engine)


async def test_the_engine_leaves_interrupts_to_its_parent_and_its_log_is_passed_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = 'echo "ERROR here: told" >&2; echo untold >&2; exec "$0" -m rekindle.testing.fake_engine "$@"'
    command = ("sh", "-c", script, sys.executable)
    replica = Replica(engine_settings(), SystemClock(), supervision=QUICK, launcher=CommandLauncher(command))
    await replica.start()
    pid = replica.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGINT)
    wanted = request("r")
    assert tokens_of(await collect(replica, wanted)) == expected_tokens(wanted)
    assert replica.engine_pid == pid
    await replica.stop()
    logged = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "rekindle.engine"]
    assert logged == [("ERROR", f"[{pid}] here: told"), ("WARNING", f"[{pid}] untold")]
