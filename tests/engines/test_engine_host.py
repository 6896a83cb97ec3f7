"""The engine process: whatever an engine does to its process, the worker gets an answer and its loop goes on."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rejoinder.worker import errors
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.protocol import EngineRequest

QUICK = HostSettings(
    start_seconds=20, hang_seconds=60, stop_seconds=5, restart_backoff=0.05, restart_backoff_limit=0.2, max_deaths=3
)
HANGING = HostSettings(
    start_seconds=20, hang_seconds=1, stop_seconds=5, restart_backoff=0.05, restart_backoff_limit=0.2, max_deaths=3
)


@contextlib.asynccontextmanager
async def engine_process(settings=QUICK, **config):
    engine = EngineProcess("misbehaving:create", config, settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()
        assert not psutil.Process().children(recursive=True)  # neither alive nor zombie


def request(what, value=None):
    return EngineRequest("/do", {what: value}, "r", 1)


async def eventually(condition, seconds=20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def running(engine, *names):
    """Start calls that wait for ever, and return when they are in the process."""
    tasks = [asyncio.create_task(engine.generate(request("waits", name))) for name in names]
    assert await engine.generate(request("echo", 1)) == 1  # frames arrive in order
    return tasks


async def test_paths_capacity_and_results_cross():
    async with engine_process() as engine:
        assert engine.paths == {"/do"}
        assert engine.capacity == 7
        value = {"n": 10**5000, "s": "\ud800 \ufffe", "f": 0.1, "l": [None, True]}
        assert await engine.generate(request("echo", value)) == value
        await eventually(lambda: engine.progress == 1)


async def test_many_at_once_are_resolved_by_id():
    async with engine_process() as engine:
        got = await asyncio.gather(*[engine.generate(request("echo", n)) for n in range(2000)])
        assert got == list(range(2000))


@pytest.mark.parametrize("name", ["BadRequest", "Missing", "RequestTooLarge", "Failed", "Unavailable"])
async def test_errors_cross_by_kind(name):
    async with engine_process() as engine:
        with pytest.raises(errors.RequestError) as caught:
            await engine.generate(request("raises", name))
        assert type(caught.value) is getattr(errors, name)
        assert caught.value.message == "no"
        if name == "BadRequest":
            assert (caught.value.param, caught.value.code) == ("x", "c")


async def test_an_unexpected_exception_is_failed_in_one_line_and_harms_nobody(capfd):
    async with engine_process() as engine:
        (neighbour,) = await running(engine, "n")
        with pytest.raises(errors.Failed) as caught:
            await engine.generate(request("crashes", "boom\nsecond line"))
        assert caught.value.message == "the engine failed on this request: RuntimeError: boom"
        with pytest.raises(errors.Failed, match="cannot be sent"):
            await engine.generate(request("returns_object"))
        assert not neighbour.done()
        neighbour.cancel()
    out, err = capfd.readouterr()
    assert out == ""
    assert "what is printed goes to the log" in err
    assert "Traceback" in err
    assert "second line" in err


async def test_cancelling_reaches_the_engine():
    async with engine_process() as engine:
        tasks = await running(engine, "a", "b")
        tasks[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert await engine.generate(request("was_cancelled")) == ["a"]
        tasks[1].cancel()


@pytest.mark.parametrize(
    ("what", "value", "how"),
    [
        ("exits", 3, "exit status 3"),
        ("exits", 0, "exit status 0"),
        ("signals", signal.SIGKILL, "signal 9"),
        ("signals", signal.SIGSEGV, "signal 11"),
        ("gone_now", "the cache is corrupt", "the cache is corrupt"),
        ("ends", None, "can serve no more"),
    ],
)
async def test_a_death_is_unavailable_for_all_and_it_comes_back(what, value, how):
    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        (neighbour,) = await running(engine, "n")
        started = time.monotonic()
        for call in (engine.generate(request(what, value)), neighbour):
            with pytest.raises(errors.Unavailable, match=how):
                await call
        assert time.monotonic() - started < 1.5 + 3 * (what == "ends")
        assert engine.capacity == 0
        with pytest.raises(errors.Unavailable):
            await engine.generate(request("echo", 1))
        await eventually(lambda: engine.capacity == 7)
        assert await engine.generate(request("pid")) != pid


async def test_killed_from_outside():
    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        (call,) = await running(engine, "n")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(errors.Unavailable, match="signal 9"):
            await call
        await eventually(lambda: engine.capacity == 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_signals_are_the_workers_to_handle(number):
    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        os.kill(pid, number)
        assert await engine.generate(request("signals_group", number)) == "alive"
        assert os.getsid(pid) != os.getsid(0)


async def test_a_stopped_process_is_a_hang():
    async with engine_process(HANGING) as engine:
        with pytest.raises(errors.Unavailable, match="hung: silent for 1 s"):
            await engine.generate(request("stops_itself"))
        await eventually(lambda: engine.capacity == 7)


async def test_a_held_gil_neither_blocks_the_worker_nor_kills_when_short():
    async with engine_process() as engine:
        call = asyncio.create_task(engine.generate(request("holds_gil", 1.5)))
        longest, last = 0.0, time.monotonic()
        while not call.done():
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert await call == "awake"
        assert longest < 0.5


async def test_a_gil_held_too_long_is_a_hang():
    async with engine_process(HANGING) as engine:
        with pytest.raises(errors.Unavailable, match="hung: silent"):
            await engine.generate(request("holds_gil", 30))
        await eventually(lambda: engine.capacity == 7)


async def test_no_progress_while_requests_run_is_a_hang():
    async with engine_process(HANGING) as engine:
        with pytest.raises(errors.Unavailable, match="hung: without progress for 1 s"):
            await engine.generate(request("waits"))
        await eventually(lambda: engine.capacity == 7)


async def test_idle_is_no_hang_and_progress_is_none_either():
    async with engine_process(HANGING) as engine:
        pid = await engine.generate(request("pid"))
        calls = await running(engine, "n")
        for _ in range(20):  # twice hang_seconds of progress
            await asyncio.sleep(0.1)
            await engine.generate(request("echo", 1))
        for call in calls:
            call.cancel()
        await asyncio.sleep(1.5)  # idle for longer than hang_seconds
        assert await engine.generate(request("pid")) == pid


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_error": "no such model; give --model a directory"}, "no such model; give --model a directory"),
        ({"load_crash": True}, "RuntimeError: weights are upside down"),
        ({"load_seconds": 30}, "not ready after 1 s"),
    ],
)
async def test_a_failing_start_says_why(config, message):
    engine = EngineProcess(
        "misbehaving:create", config, HostSettings(start_seconds=1 if "load_seconds" in config else 20)
    )
    with pytest.raises(errors.EngineGone) as caught:
        await engine.start()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not psutil.Process().children()
    await engine.stop()


@pytest.mark.parametrize("factory", ["no_such_module:create", "misbehaving:nothing"])
async def test_an_unknown_factory_is_said(factory):
    with pytest.raises(errors.EngineGone, match="there is no engine"):
        await EngineProcess(factory, {}, QUICK).start()


async def test_too_many_deaths_end_it(tmp_path):
    async with engine_process(die_after_first_load=str(tmp_path / "loaded")) as engine:
        with pytest.raises(errors.Unavailable):
            await engine.generate(request("exits", 1))
        async with asyncio.timeout(20):
            await engine.wait_gone()
        with pytest.raises(errors.EngineGone, match="3 times in a row"):
            await engine.generate(request("echo", 1))


async def test_a_completed_request_forgives_earlier_deaths():
    async with engine_process() as engine:
        for _ in range(QUICK.max_deaths + 1):
            await engine.generate(request("echo", 1))
            with pytest.raises(errors.Unavailable):
                await engine.generate(request("exits", 1))
            await eventually(lambda: engine.capacity == 7)
        assert engine.deaths == 1


async def test_stop_is_idempotent_and_ends_what_runs():
    engine = EngineProcess("misbehaving:create", {}, QUICK)
    await engine.start()
    (call,) = await running(engine, "n")
    await engine.stop()
    with pytest.raises(errors.Unavailable, match="stopped"):
        await call
    with pytest.raises(errors.Unavailable):
        await engine.generate(request("echo", 1))
    await engine.stop()


async def test_an_engine_that_does_not_stop_is_killed():
    engine = EngineProcess("misbehaving:create", {"stop_hangs": True}, HostSettings(stop_seconds=0.5))
    await engine.start()
    started = time.monotonic()
    await engine.stop()
    assert time.monotonic() - started < 2


def open_files():
    return psutil.Process().num_fds()


async def test_nothing_leaks():
    async with engine_process() as engine:
        await engine.generate(request("echo", 1))
        before = open_files(), len(asyncio.all_tasks())
        for _ in range(3):
            await engine.generate(request("echo", 1))
            with pytest.raises(errors.Unavailable):
                await engine.generate(request("exits", 1))
            await eventually(lambda: engine.capacity == 7)
        assert (open_files(), len(asyncio.all_tasks())) == before
    assert len(asyncio.all_tasks()) == 1


PARENT = """
import asyncio, sys
from rejoinder.worker.engines.host import EngineProcess
from rejoinder.worker.engines.protocol import EngineRequest
async def main():
    engine = EngineProcess("misbehaving:create", {})
    await engine.start()
    print(await engine.generate(EngineRequest("/do", {"pid": None}, "r", 1)), flush=True)
    await engine.generate(EngineRequest("/do", {sys.argv[1]: 60}, "r", 1))
asyncio.run(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is Linux's")
@pytest.mark.parametrize("what", ["waits", "holds_gil"])
def test_the_process_dies_with_its_worker(what):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, what],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        assert child.wait(timeout=5) in (0, 1, None, -signal.SIGKILL)


def test_the_host_imports_no_torch():
    code = (
        "import sys, rejoinder.worker.engines.host; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
