"""How an engine process ends, hangs and comes back, and when it does not any more."""

import asyncio
import dataclasses
import errno
import os
import signal
import socket
import subprocess

import psutil
import pytest
from engine_harness import eventually
from host_harness import HANGING, QUICK, engine_process, request, running

from rejoinder.worker import errors
from rejoinder.worker.engines.host import EngineProcess

pytestmark = pytest.mark.usefixtures("own_children")


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
        for call in (engine.generate(request(what, value)), neighbour):
            with pytest.raises(errors.Unavailable, match=how):
                await call
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


def counted_beats(engine):
    channel, seen = engine._child.channel, []
    original = channel._on_frame

    def on_frame(frame):
        seen.extend([1] * (frame["kind"] == "beat"))
        original(frame)

    channel._on_frame = on_frame
    return lambda: len(seen)


async def test_a_stopped_process_is_a_hang():
    async with engine_process(HANGING) as engine:
        with pytest.raises(errors.Unavailable, match="hung: silent for 1 s"):
            await engine.generate(request("stops_itself"))
        await eventually(lambda: engine.capacity == 7)


async def test_a_held_gil_neither_blocks_the_worker_nor_kills_when_short(tmp_path):
    fifo = tmp_path / "release"
    os.mkfifo(fifo)
    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        call = asyncio.create_task(engine.generate(request("holds_gil_until", str(fifo))))
        release = await asyncio.to_thread(os.open, fifo, os.O_WRONLY)  # returns when the engine is there
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not call.done()
        assert engine.capacity == 7
        os.write(release, b"x")
        os.close(release)
        assert await call == "awake"
        assert await engine.generate(request("pid")) == pid


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
    # Long enough for a process that a busy machine lets stand for a while.
    async with engine_process(dataclasses.replace(HANGING, hang_seconds=4)) as engine:
        pid = await engine.generate(request("pid"))
        beats = counted_beats(engine)
        calls = await running(engine, "n")
        for number in range(13):  # of the ten in hang_seconds
            await eventually(lambda number=number: beats() > number)
            await engine.generate(request("echo", 1))
        for call in calls:
            call.cancel()
        before = beats()
        await eventually(lambda: beats() > before + 12)  # idle for longer than hang_seconds
        assert await engine.generate(request("pid")) == pid


async def test_too_many_deaths_end_it(tmp_path):
    async with engine_process(die_after_first_load=str(tmp_path / "loaded")) as engine:
        with pytest.raises(errors.Unavailable):
            await engine.generate(request("exits", 1))
        async with asyncio.timeout(60):
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


async def test_errors_of_a_dying_engine_forgive_nothing(monkeypatch):
    """A generation thread that ends answers what is in flight, and then its process ends."""
    settings = dataclasses.replace(QUICK, restart_backoff=0.0625, restart_backoff_limit=10)
    pauses, sleep = [], asyncio.sleep

    async def noted(seconds):
        pauses.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    async with engine_process(settings) as engine:
        for deaths in (1, 2, 3):
            with pytest.raises(errors.Unavailable, match="the whole batch failed"):
                await engine.generate(request("fails_with_all"))
            await eventually(lambda deaths=deaths: engine.deaths == deaths)
            await eventually(lambda: engine.capacity == 7 or engine._gone.is_set())
        with pytest.raises(errors.EngineGone, match="3 times in a row"):
            await engine.generate(request("echo", 1))
        await engine.wait_gone()
    assert [pause for pause in pauses if pause in {0.0625, 0.125, 0.25}] == [0.0625, 0.125]


WITHOUT_MEMORY = [(subprocess, "Popen"), (socket, "socketpair"), (os, "pidfd_open")]


def without_memory(monkeypatch, module, name, times):
    """Let a function fail some times, as it does where there is no memory."""
    original = getattr(module, name)
    left = [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))] * times

    def sparse(*args, **kwargs):
        if left:
            raise left.pop()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, sparse)


@pytest.mark.parametrize(("module", "name"), WITHOUT_MEMORY)
async def test_a_restart_without_memory_is_one_more_death(monkeypatch, module, name):
    async with engine_process() as engine:
        pid, before = await engine.generate(request("pid")), open_files()
        without_memory(monkeypatch, module, name, 1)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: engine.capacity == 0)
        await eventually(lambda: engine.capacity == 7)
        assert engine.deaths == (1 if name == "pidfd_open" else 2)
        assert await engine.generate(request("pid")) != pid
        assert open_files() == before - (name == "pidfd_open")


@pytest.mark.parametrize(("module", "name"), WITHOUT_MEMORY[:2])
async def test_a_start_without_memory_says_so(monkeypatch, module, name):
    engine, before = EngineProcess("misbehaving:create", {}, QUICK), open_files()
    without_memory(monkeypatch, module, name, 1)
    with pytest.raises(errors.EngineGone, match=r"the engine process could not be started: .*Cannot allocate memory"):
        await engine.start()
    assert open_files() == before
    await engine.stop()


async def test_memory_that_never_comes_back_ends_it(monkeypatch):
    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        without_memory(monkeypatch, subprocess, "Popen", QUICK.max_deaths)
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            await engine.wait_gone()
        with pytest.raises(errors.EngineGone, match=r"3 times in a row; the last time: .*Cannot allocate memory"):
            await engine.generate(request("echo", 1))


async def test_a_supervisor_that_fails_is_no_silence(monkeypatch):
    async with engine_process() as engine:
        without_memory(monkeypatch, engine, "_restart", 1)
        os.kill(await engine.generate(request("pid")), signal.SIGKILL)
        async with asyncio.timeout(60):
            await engine.wait_gone()
        with pytest.raises(errors.EngineGone, match="cannot be supervised: OSError"):
            await engine.generate(request("echo", 1))


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
