"""Several real engine processes under one worker: shared out, started and lost one by one."""

import asyncio
import contextlib
import dataclasses
import os
import signal

import pytest
from children import children
from engine_harness import GREEDY, SMALL, completion, eventually
from host_harness import QUICK, request
from poisoned import deaths, lives

from rejoinder.worker import errors
from rejoinder.worker.engines.factory import FACTORY, create_engine
from rejoinder.worker.engines.host import EngineProcess
from rejoinder.worker.engines.pool import EnginePool
from rejoinder.worker.engines.protocol import EngineRequest
from rejoinder.worker.engines.quarantine import Suspects
from rejoinder.worker.settings import Settings

pytestmark = pytest.mark.usefixtures("own_children")


def make(configs, factory="misbehaving:create", settings=QUICK):
    suspects = Suspects()
    return EnginePool(
        [EngineProcess(factory, config, settings, suspects, f"cpu {n}") for n, config in enumerate(configs)], suspects
    )


@contextlib.asynccontextmanager
async def pool(*configs, **options):
    it = make(configs, **options)
    await it.start()
    try:
        yield it
    finally:
        await it.stop()
        assert not children()


async def pids(it, count):
    """The processes of some requests that run at once."""
    return await asyncio.gather(*[it.generate(request("pid_after", 0.2)) for _ in range(count)])


async def test_capacity_and_progress_are_sums_and_requests_go_where_there_is_room():
    async with pool({}, {"capacity": 3}) as it:
        assert it.paths == {"/do"}
        assert it.capacity == 10
        first, *others = await pids(it, 10)
        assert sorted([[first, *others].count(pid) for pid in {first, *others}]) == [3, 7]
        await eventually(lambda: it.progress == 10)
        assert len(set(await pids(it, 5))) == 1  # the larger one has more room


async def test_a_killed_process_takes_only_its_own_requests_and_comes_back(tmp_path):
    go = tmp_path / "go"
    async with pool({}, {}, {}) as it:
        calls = [asyncio.create_task(it.generate(request("pid_once_there", str(go)))) for _ in range(9)]
        victim = await it.generate(request("pid"))
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: it.capacity == 14)
        assert await it.generate(request("pid")) != victim
        go.touch()
        results = await asyncio.gather(*calls, return_exceptions=True)
        lost = [result for result in results if isinstance(result, errors.Unavailable)]
        assert len(lost) == 3
        assert sorted(results.count(pid) for pid in set(results) - set(lost)) == [3, 3]
        await eventually(lambda: it.capacity == 21)
        assert len(set(await pids(it, 9))) == 3


async def test_one_that_cannot_start_is_named_and_the_others_are_stopped():
    it = make([{"stop_hangs": False}, {"load_error": "no such device"}, {"load_seconds": 3}])
    with pytest.raises(errors.EngineGone, match="cpu 1: the engine could not be started: no such device"):
        await it.start()
    assert not children()
    await it.stop()


async def test_a_start_that_is_cancelled_leaves_nothing():
    it = make([{}, {"load_seconds": 20}])
    starting = asyncio.create_task(it.start())
    await eventually(lambda: it.capacity == 7)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not children()


async def test_it_goes_on_with_those_that_are_left_until_all_are_gone(tmp_path):
    async with pool({"die_after_first_load": str(tmp_path / "a")}, {"die_after_first_load": str(tmp_path / "b")}) as it:
        gone = asyncio.create_task(it.wait_gone())
        first = await it.generate(request("pid"))
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: sum(process.gone is not None for process in it._processes) == 1)
        assert not gone.done()
        assert it.capacity == 7
        other = await it.generate(request("pid"))
        assert other != first
        # A suspect too, wherever it would have gone before.
        assert await it.generate(request("pid", attempt=4)) == other
        os.kill(other, signal.SIGKILL)
        await eventually(lambda: it.capacity == 0)
        waiting = it.generate(request("echo", attempt=4))  # at a gate that never opens any more
        with pytest.raises(errors.EngineGone, match=r"cpu 0: .*3 times in a row.*; cpu 1: .*3 times in a row"):
            await asyncio.wait_for(waiting, 60)
        await asyncio.wait_for(gone, 60)


def poisoned(name, attempt=1, **body):
    return EngineRequest("/do", {"n": name, **body}, name, 1, attempt)


async def test_suspects_run_in_the_last_process_and_the_others_never_pause(tmp_path):
    journal = tmp_path / "journal"
    config = {"journal": str(journal), "capacity": 4}
    async with pool(config, config, factory="poisoned:create") as it:
        suspects = [asyncio.create_task(it.generate(poisoned(f"s{n}", 3, steps=20))) for n in range(3)]
        killer = asyncio.create_task(it.generate(poisoned("k", 3, kills="exit")))
        await eventually(lambda: "in s0" in journal.read_text())
        assert it.capacity == 4 + 4  # the last one holds four, and has room for no other
        fresh = await asyncio.gather(*[it.generate(poisoned(f"f{n}", steps=5)) for n in range(4)])
        assert fresh == [f"f{n}" for n in range(4)]
        assert await asyncio.gather(*suspects) == ["s0", "s1", "s2"]
        with pytest.raises(errors.Unavailable):
            await killer
        # While the last is away, suspects wait for it and fresh ones do not.
        waiting = asyncio.create_task(it.generate(poisoned("s4", 3)))
        assert await it.generate(poisoned("f5")) == "f5"
        assert await waiting == "s4"
    assert deaths(journal) == [{"k"}]
    fresh_only = [life for life in lives(journal) if any(name.startswith("f") for name in life.ran)]
    assert len(fresh_only) == 1
    assert not any(name.startswith(("s", "k")) for name in fresh_only[0].ran)


async def test_the_model_in_two_processes_outlives_a_kill(tiny, tmp_path):
    config = {**SMALL, "model": str(tiny), "cache": str(tmp_path), "device": "cpu"}
    patient = dataclasses.replace(QUICK, start_seconds=200)  # torch on a busy machine
    async with pool(config, config, factory=FACTORY, settings=patient) as it:
        full = it.capacity
        assert [process.capacity for process in it._processes] == [full // 2] * 2
        alone = await it.generate(completion(GREEDY, "alone"))
        body = {**GREEDY, "max_tokens": 200, "stop": None}
        last = it._processes[-1]
        os.kill(last._child._process.pid, signal.SIGSTOP)  # none of its requests ends before it is killed
        calls = [asyncio.create_task(it.generate(completion(body, f"r{n}"))) for n in range(8)]
        await eventually(lambda: [process.held for process in it._processes] == [4, 4])
        os.kill(last._child._process.pid, signal.SIGKILL)
        results = await asyncio.gather(*calls, return_exceptions=True)
        lost = [result for result in results if isinstance(result, errors.Unavailable)]
        texts = {str(result["choices"]) for result in results if not isinstance(result, Exception)}
        assert len(lost) == 4
        assert len(texts) == 1
        await eventually(lambda: it.capacity == full, 200)
        again = await asyncio.gather(*[it.generate(completion(GREEDY, f"r{n}")) for n in range(8)])
        assert {str(result["choices"]) for result in again} == {str(alone["choices"])}


GIVEN = {"requests": "memory://a", "responses": "memory://b", "model": "x"}


def test_the_settings_make_the_pool(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    single = create_engine(Settings(**GIVEN, devices=["cuda:1"]))
    assert isinstance(single, EngineProcess)
    assert (single._config["device"], single._config["threads"]) == ("cuda:1", None)
    several = create_engine(Settings(**GIVEN, devices="cuda:0, cuda:1"))
    assert [(one.name, one._config["device"]) for one in several._processes] == [("cuda:0",) * 2, ("cuda:1",) * 2]
    copies = create_engine(Settings(**GIVEN, device="cpu", engine_processes=4))
    assert [one.name for one in copies._processes] == [f"cpu, process {n}" for n in (1, 2, 3, 4)]
    assert [one._config["threads"] for one in copies._processes] == [1] * 4
    threads = create_engine(Settings(**GIVEN, device="cpu", engine_processes=2, threads=5))
    assert [one._config["threads"] for one in threads._processes] == [5, 5]
    halves = create_engine(Settings(**GIVEN, device="cpu", engine_processes=2))
    assert [one._config["threads"] for one in halves._processes] == [3, 3]
