"""How many calls run at once, what a cancelled one leaves behind, and how the engine ends."""

import asyncio
import threading

import pytest
from engine_harness import eventually
from function_apps import ask, in_process, request, serving

from rejoinder.worker.engines.factory import create_engine
from rejoinder.worker.engines.functions.threads import Threads
from rejoinder.worker.engines.host import EngineProcess
from rejoinder.worker.engines.pool import EnginePool
from rejoinder.worker.errors import EngineGone, Unavailable
from rejoinder.worker.settings import resolve

BLOCKING = """
    import threading, time
    gate, running, most = threading.Event(), [], []
    seen = []

    @generate(concurrency=2)
    def one(body, context):
        running.append(1)
        most.append(len(running))
        try:
            gate.wait(60)
            seen.append(context.cancelled)
        finally:
            running.pop()
        return body
    @generate("/open")
    async def opened(body): gate.set()
    @generate("/seen")
    async def told(body): return {"seen": sorted(seen), "running": len(running), "most": max(most, default=0)}
"""


async def told(engine, **want):
    async with asyncio.timeout(60):
        while {name: (await ask(engine, path="/seen"))[name] for name in want} != want:
            await asyncio.sleep(0.01)


async def test_calls_at_once_are_bounded_and_capacity_says_how_many(tmp_path):
    async with serving(tmp_path, BLOCKING, concurrency=3) as engine:
        assert engine.capacity == 2 + 3
        calls = [asyncio.create_task(ask(engine, n)) for n in range(10)]
        await told(engine, running=2)
        await ask(engine, path="/open")
        assert await asyncio.gather(*calls) == list(range(10))
        await told(engine, running=0, most=2)
    assert engine.capacity == 0


async def test_capacity_of_batches(tmp_path):
    source = """
        @generate_batch(max_batch_size=16, concurrency=2)
        def many(bodies): return bodies
        @generate_batch("/other")
        def other(bodies): return bodies
        @generate("/a")
        def a(body): return body
        @generate_stream("/a")
        def b(body): yield body
    """
    async with serving(tmp_path, source, max_batch_size=8, concurrency=4) as engine:
        assert engine.capacity == 16 * 3 + 8 * 2 + 4
        await asyncio.gather(*(ask(engine, n) for n in range(32)))
        stats = engine.stats
        assert (stats.sequences, stats.places) == (32, 16 * stats.steps)


async def test_a_cancelled_call_in_this_process_returns_at_once_and_keeps_its_place(tmp_path):
    async with serving(tmp_path, BLOCKING) as engine:
        calls = [asyncio.create_task(ask(engine, n)) for n in range(2)]
        await told(engine, running=2)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        assert all(call.cancelled() for call in calls)
        late = asyncio.create_task(ask(engine, 5))
        await told(engine, running=2, most=2)
        assert not late.done()
        await ask(engine, path="/open")
        assert await late == 5
        await told(engine, seen=[False, True, True], most=2)  # in whichever order


async def test_one_that_lingers_returns_when_its_thread_is_free(tmp_path):
    async with serving(tmp_path, BLOCKING, linger=True) as engine:
        call = asyncio.create_task(ask(engine, 1))
        await told(engine, running=1)
        for _ in range(3):
            call.cancel()
            await asyncio.sleep(0)
        await told(engine, running=1)
        assert not call.done()
        await ask(engine, path="/open")
        await asyncio.wait({call})
        assert call.cancelled()
        await told(engine, seen=[True])


@pytest.mark.parametrize("kind", ["def", "async def"])
@pytest.mark.parametrize("linger", [False, True])
async def test_who_is_cancelled_in_a_batch_is_told_and_its_neighbours_are_answered(tmp_path, kind, linger):
    source = f"""
        import asyncio, threading, time
        started, gate = threading.Event(), threading.Event()
        @generate_batch(max_batch_size=3)
        {kind} many(bodies, contexts):
            started.set()
            while not gate.is_set():
                {"time.sleep(0.001)" if kind == "def" else "await asyncio.sleep(0.001)"}
            return [[body, [context.cancelled for context in contexts]] for body in bodies]
        @generate("/started")
        async def is_started(body): return started.is_set()
        @generate("/open")
        async def opened(body): gate.set()
    """
    async with serving(tmp_path, source, linger=linger, max_wait_ms=5000) as engine:
        calls = [asyncio.create_task(ask(engine, n)) for n in range(3)]
        async with asyncio.timeout(60):
            while not await ask(engine, path="/started"):
                await asyncio.sleep(0.01)
        calls[1].cancel()
        await asyncio.wait({calls[1]})
        await ask(engine, path="/open")
        assert await calls[0] == [0, [False, True, False]]
        assert await calls[2] == [2, [False, True, False]]


async def test_the_last_of_a_batch_that_lingers_is_told_while_its_call_runs(tmp_path):
    source = """
        import time
        started = []
        @generate_batch
        def many(bodies, contexts):
            started.append(1)
            while not contexts[0].cancelled:
                time.sleep(0.001)
            started.append("told")
        @generate("/started")
        async def is_started(body): return started
    """
    async with serving(tmp_path, source, linger=True) as engine:
        call = asyncio.create_task(ask(engine))
        async with asyncio.timeout(60):
            while not await ask(engine, path="/started"):
                await asyncio.sleep(0.01)
            call.cancel()
            await asyncio.wait({call})
        assert call.cancelled()
        assert await ask(engine, path="/started") == [1, "told"]


async def test_cancelling_an_async_function_reaches_it(tmp_path):
    source = """
        import asyncio
        seen = []
        @generate
        async def one(body, context):
            try: await asyncio.sleep(3600)
            finally: seen.append(context.cancelled)
        @generate("/seen")
        def told(body): return seen
    """
    async with serving(tmp_path, source) as engine:
        call = asyncio.create_task(ask(engine))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        assert await ask(engine, path="/seen") == [True]


@pytest.mark.parametrize("linger", [False, True])
async def test_stopping_ends_all_calls_and_what_goes_on_is_left(tmp_path, linger):
    before = set(threading.enumerate())
    async with serving(tmp_path, BLOCKING, linger=linger) as engine:
        calls = [asyncio.create_task(ask(engine, n)) for n in range(4)]
        await told(engine, running=2)
        stopping = asyncio.create_task(engine.stop())
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
        with pytest.raises(Unavailable):
            await ask(engine, path="/open")
        await stopping  # the two that nobody can end do not keep it
        left = {thread for thread in threading.enumerate() if thread.name.startswith("function-")} - before
        assert len(left) == 2
        assert all(thread.daemon for thread in left)


async def test_threads_are_kept_and_as_many_as_needed():
    threads = Threads()
    gate = threading.Event()
    calls = [asyncio.create_task(threads.run(lambda _: gate.wait(20))) for _ in range(3)]
    await asyncio.sleep(0)
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("function-")}
    gate.set()
    await asyncio.gather(*calls)
    for _ in range(20):
        assert await threads.run(lambda _: threading.current_thread().name) in names
    assert await threads.stop() == 0


async def test_a_long_call_is_no_hang(tmp_path):
    source = f"""
        import pathlib, time
        @generate
        def one(body):
            while not pathlib.Path({str(tmp_path / "go")!r}).exists(): time.sleep(0.01)
            return "done"
    """
    async with in_process(tmp_path, source) as engine:
        call = asyncio.create_task(ask(engine))
        for _ in range(2):
            before = engine.progress
            await eventually(lambda before=before: engine.progress > before)
        assert not call.done()
        (tmp_path / "go").touch()
        assert await call == "done"


@pytest.mark.parametrize("how", ["time.sleep(3600)", "spin()", "swallow()"])
async def test_a_call_that_goes_on_after_its_request_was_cancelled_ends_with_its_process(tmp_path, how):
    source = f"""
        import asyncio, os, pathlib, time
        started = pathlib.Path({str(tmp_path / "started")!r})
        def spin():
            while True: pass
        async def swallow():
            while True:
                try: await asyncio.sleep(3600)
                except asyncio.CancelledError: pass
        @generate
        def one(body):
            started.touch()
            return {how}
        @generate("/pid")
        async def pid(body): return os.getpid()
    """
    async with in_process(tmp_path, source, cancel_seconds=0.3) as engine:
        first = await ask(engine, path="/pid")
        call = asyncio.create_task(ask(engine))
        await eventually((tmp_path / "started").exists)
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled()
        # Asked again as long as the old process answers, or none does.
        async with asyncio.timeout(60):
            while True:
                try:
                    if await ask(engine, path="/pid") != first:
                        break
                except Unavailable:
                    pass
                await asyncio.sleep(0.05)
        assert engine.deaths == 0


def settings(tmp_path, **more):
    flags = {"requests": "memory://a", "responses": "memory://b", "app": "none_of_this_name", "app_dir": tmp_path}
    return resolve({**flags, **more}, environ={}).settings


async def test_the_factory_gives_each_process_one_gpu_and_the_limits(tmp_path):
    one = create_engine(settings(tmp_path, app_cancel_seconds=3.0))
    assert isinstance(one, EngineProcess)
    assert one._settings.cancel_seconds == 3.0
    assert (one._config["linger"], one._config["device"]) == (True, "auto")
    pool = create_engine(settings(tmp_path, devices="cuda:1,cuda:3"))
    assert isinstance(pool, EnginePool)
    told = [(p._config["device"], p._config["visible_device"]) for p in pool._processes]
    assert told == [("cuda", 1), ("cuda", 3)]
    here = create_engine(settings(tmp_path, engine_process=False, token="t"))
    assert "linger" not in here._config
    with pytest.raises(EngineGone, match="there is no module 'none_of_this_name'"):
        await here.start()
    await here.stop()


async def test_the_device_is_what_the_process_sees(tmp_path, monkeypatch):
    source = """
        import os
        @generate
        def one(body, context): return [context.device, os.environ.get("CUDA_VISIBLE_DEVICES")]
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    async with in_process(tmp_path, source, device="cuda", visible_device=1) as engine:
        assert await ask(engine) == ["cuda", "GPU-abc"]


async def test_a_request_that_is_cancelled_before_it_runs_takes_no_place(tmp_path):
    async with serving(tmp_path, BLOCKING) as engine:
        calls = [asyncio.create_task(engine.generate(request(n))) for n in range(6)]
        await told(engine, running=2)
        for call in calls[2:]:
            call.cancel()
        await asyncio.wait(calls[2:])
        await ask(engine, path="/open")
        assert await asyncio.gather(*calls[:2]) == [0, 1]
        await eventually(lambda: not engine._running)
        assert (await ask(engine, path="/seen"))["most"] == 2
