"""Cancelled requests that go on: their process is killed, and nobody else loses an attempt by it."""

import asyncio
import contextlib
import dataclasses
import os
import signal

import psutil
import pytest
from engine_harness import eventually
from host_harness import QUICK, engine_process, request, running
from structlog.testing import capture_logs
from test_engine_pool import pool

from rejoinder.worker import errors
from rejoinder.worker.engines.calls import Calls

pytestmark = pytest.mark.usefixtures("own_children")

CUTTING = dataclasses.replace(QUICK, cancel_seconds=0.3, restart_backoff=600, restart_backoff_limit=600)
"""A death would be seen: the next process would come after ten minutes."""
PATIENT = dataclasses.replace(CUTTING, cancel_seconds=600)


def cutting(**config):
    return engine_process(CUTTING, **config)


def runs(pid):
    """Whether it does anything. Who has no parent to wait for it may stay as a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def leave(*calls):
    """Cancel calls; they must end with that, whatever the engine does."""
    for call in calls:
        call.cancel()
    for call in calls:
        with pytest.raises(asyncio.CancelledError):
            await call


async def begin(engine, what, value=None, **asked):
    """Start a call and return when it runs in the process."""
    call = asyncio.create_task(engine.generate(request(what, value, **asked)))
    assert await engine.generate(request("echo", 1)) == 1  # frames arrive in order
    return call


async def begin_and_block(engine, what, mark):
    """As `begin`, of what lets the process do nothing else."""
    call = asyncio.create_task(engine.generate(request(what, str(mark))))
    await eventually(mark.exists)
    return call


@contextlib.contextmanager
def only_replaced(times):
    """No process may die meanwhile, and so many are replaced."""
    with capture_logs() as logs:
        yield logs
    events = [entry["event"] for entry in logs]
    assert events == ["engine_process_replaced"] * times


@pytest.mark.parametrize(
    "what", ["goes_on", "goes_on_in_a_thread", "blocks_the_loop", "holds_gil_for_ever", "stops_itself"]
)
async def test_what_goes_on_is_ended_with_its_process_and_neighbours_are_answered(tmp_path, what):
    async with cutting() as engine:
        with only_replaced(1):
            pid = await engine.generate(request("pid"))
            neighbours = [
                await begin(engine, "waits_the_first_time", str(tmp_path / f"n{n}"), name=f"n{n}") for n in range(3)
            ]
            if what in {"blocks_the_loop", "holds_gil_for_ever"}:
                call = await begin_and_block(engine, what, tmp_path / "blocked")
            elif what == "stops_itself":
                call = asyncio.create_task(engine.generate(request(what)))
                await eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
            else:
                call = await begin(engine, what)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert runs(pid)  # who leaves does not wait for that
            (next_pid,) = set(await asyncio.gather(*neighbours))
        assert not runs(pid)
        assert next_pid != pid
        assert await engine.generate(request("pid")) == next_pid
        assert engine.deaths == 0
        assert all(engine._suspects.company(request("echo", name=f"n{n}"), 8) == 0 for n in range(3))


async def test_what_it_has_started_ends_with_it(tmp_path):
    async with cutting() as engine:
        mark = tmp_path / "pid"
        call = await begin(engine, "goes_on_with_a_process", str(mark))
        started = int(mark.read_text())
        assert runs(started)
        await leave(call)
        await eventually(lambda: not runs(started))


async def test_what_ends_costs_nothing(tmp_path):
    settings = dataclasses.replace(CUTTING, cancel_seconds=6)  # for a process that a busy machine lets stand
    async with engine_process(settings) as engine:
        with only_replaced(1):
            pid = await engine.generate(request("pid"))
            await leave(*await running(engine, *"abc"))
            await nothing_goes_on(engine)
            call = asyncio.create_task(engine.generate(request("waits", "d")))
            await asyncio.sleep(0)  # sent, and cancelled before its first line in the process
            await leave(call)
            await nothing_goes_on(engine)
            assert await engine.generate(request("pid")) == pid
            neighbour = await begin(engine, "waits_the_first_time", str(tmp_path / "n"))
            await leave(await begin(engine, "goes_on"))
            assert await neighbour != pid


async def test_without_a_limit_it_goes_on_and_is_suspect_where_the_process_dies_of_it():
    async with engine_process() as engine:
        pid = await engine.generate(request("pid"))
        await leave(await begin(engine, "goes_on", "mine", name="mine"))
        await eventually_cancelled(engine, "mine")
        assert await engine.generate(request("pid")) == pid
        with pytest.raises(errors.Unavailable):
            await engine.generate(request("exits", 1, name="other"))
        await eventually(lambda: engine.capacity == 7)
        assert engine._suspects.company(request("echo", name="mine"), 8) == 2


async def nothing_goes_on(engine):
    await eventually(lambda: not list(engine._child._calls))


async def eventually_cancelled(engine, name):
    async with asyncio.timeout(60):
        while name not in await engine.generate(request("was_cancelled")):
            pass


async def test_many_at_once_cost_one_process(tmp_path):
    async with cutting() as engine:
        with only_replaced(1) as logs:
            neighbour = await begin(engine, "waits_the_first_time", str(tmp_path / "n"))
            await leave(*[await begin(engine, "goes_on", n) for n in range(20)])
            pid = await neighbour
            assert await engine.generate(request("pid")) == pid
        assert logs[0]["running"] == 21
        assert "0.3 s after it was cancelled" in logs[0]["why"]


async def test_one_after_the_other_is_no_reason_to_give_up(tmp_path):
    async with cutting() as engine:
        with only_replaced(QUICK.max_deaths + 1):
            for number in range(QUICK.max_deaths + 1):
                neighbour = await begin(engine, "waits_the_first_time", str(tmp_path / f"n{number}"))
                await leave(await begin(engine, "goes_on"))
                await neighbour
        assert engine.deaths == 0


async def test_a_stream_that_has_begun_is_not_run_again_and_one_that_has_not_is(tmp_path):
    async with cutting() as engine:
        seen = {"begun": [], "quiet": []}
        calls = []
        for name, what in (("begun", "emits_and_waits_the_first_time"), ("quiet", "waits_the_first_time")):
            asked = request(what, str(tmp_path / name), name=name)
            asked.emit = seen[name].append
            calls.append(asyncio.create_task(engine.generate(asked)))
        await eventually(lambda: seen["begun"] and (tmp_path / "quiet").exists())
        with only_replaced(1):
            await leave(await begin(engine, "goes_on"))
            with pytest.raises(errors.Unavailable, match="a stream in it that had begun"):
                await calls[0]
            assert await calls[1] == await engine.generate(request("pid"))
        assert seen == {"begun": ["first"], "quiet": []}
        assert engine._suspects.company(request("echo", name="begun"), 8) == 0


async def test_a_suspect_in_the_next_turn_is_run_again_and_stays_what_it_is(tmp_path):
    async with cutting() as engine:
        with only_replaced(1):
            first = asyncio.create_task(engine.generate(request("goes_on", name="a", attempt=3)))
            await eventually(lambda: engine.progress == 1)  # it runs
            second = asyncio.create_task(
                engine.generate(request("waits_the_first_time", str(tmp_path / "n"), name="b", attempt=3))
            )
            await eventually(lambda: engine.held == 2)
            assert not (tmp_path / "n").exists()
            await leave(first)
            assert await second


async def test_while_the_next_process_loads_all_wait_without_their_time(tmp_path):
    go = tmp_path / "go"
    async with cutting(later_loads_wait_for=str(go)) as engine:
        said = {"neighbour": [], "fresh": []}
        asked = {
            "neighbour": request("waits_the_first_time", str(tmp_path / "n")),
            "fresh": request("pid"),
        }
        for name, one in asked.items():
            one.waits = said[name].append
        calls = [asyncio.create_task(engine.generate(asked["neighbour"]))]
        await eventually((tmp_path / "n").exists)
        other = await begin(engine, "waits_the_first_time", str(tmp_path / "other"))
        await leave(await begin(engine, "goes_on"))
        assert said["neighbour"] == []
        await eventually(lambda: engine.capacity == 0)
        calls.append(asyncio.create_task(engine.generate(asked["fresh"])))
        await eventually(lambda: said == {"neighbour": [True], "fresh": [True]})
        assert engine.held == 3
        await leave(other)  # who is cancelled meanwhile goes at once
        assert engine.held == 2
        go.touch()
        assert len(set(await asyncio.gather(*calls))) == 1
        assert said == {"neighbour": [True, False], "fresh": [True, False]}
        assert engine.held == 0


async def test_stopping_while_the_next_process_loads_hands_all_back_at_once(tmp_path):
    async with cutting(later_loads_wait_for=str(tmp_path / "never")) as engine:
        neighbour = await begin(engine, "waits_the_first_time", str(tmp_path / "n"))
        await leave(await begin(engine, "goes_on"))
        await eventually(lambda: engine.capacity == 0)
        await engine.stop()
        with pytest.raises(errors.Unavailable, match="stopped"):
            await neighbour


async def test_stopping_ends_what_goes_on():
    async with engine_process(PATIENT) as engine:
        pid = await engine.generate(request("pid"))
        await leave(await begin(engine, "goes_on"))
        (neighbour,) = await running(engine, "n")
        await engine.stop()
        assert not runs(pid)
        with pytest.raises(errors.Unavailable, match="stopped"):
            await neighbour


async def test_a_process_that_dies_before_it_is_killed_has_died():
    async with engine_process(dataclasses.replace(PATIENT, restart_backoff=0.05)) as engine:
        pid = await engine.generate(request("pid"))
        await leave(await begin(engine, "goes_on", name="mine"))
        (neighbour,) = await running(engine, "n")
        (waiting,) = engine._child._calls._unwanted.values()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(errors.Unavailable, match="signal 9"):
            await neighbour
        await eventually(lambda: engine.capacity == 7)
        assert engine.deaths == 1
        assert waiting.timer.cancelled()  # the next process is not killed for it
        assert engine._suspects.company(request("echo", name="mine"), 8) == 2


async def test_a_process_that_has_died_unnoticed_is_not_killed_for_what_goes_on():
    async with engine_process(dataclasses.replace(PATIENT, restart_backoff=0.05)) as engine:
        pid = await engine.generate(request("pid"))
        await leave(await begin(engine, "goes_on", name="mine"))
        (neighbour,) = await running(engine, "n")
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        engine._child._overdue()  # before the loop hears of it
        with pytest.raises(errors.Unavailable, match="signal 9"):
            await neighbour
        await eventually(lambda: engine.capacity == 7)
        assert engine.deaths == 1


async def test_a_next_process_that_never_comes_hands_all_back(tmp_path):
    settings = dataclasses.replace(CUTTING, restart_backoff=0.05)
    async with engine_process(settings, die_after_first_load=str(tmp_path / "loaded")) as engine:
        neighbour = await begin(engine, "waits_the_first_time", str(tmp_path / "n"))
        await leave(await begin(engine, "goes_on"))
        with pytest.raises(errors.EngineGone, match="3 times in a row"):
            await asyncio.wait_for(neighbour, 60)
        await engine.wait_gone()


async def test_in_a_pool_the_others_are_not_touched(tmp_path):
    async with pool({}, {}, settings=CUTTING) as it:
        with only_replaced(1):
            calls = [
                asyncio.create_task(it.generate(request("waits_the_first_time", str(tmp_path / f"n{n}"))))
                for n in range(4)
            ]
            await eventually(lambda: all((tmp_path / f"n{n}").exists() for n in range(4)))
            first, second = (process._child._process.pid for process in it._processes)
            one = asyncio.create_task(it.generate(request("goes_on")))
            await eventually(lambda: [process.held for process in it._processes] == [3, 2])
            assert await it._processes[0].generate(request("echo", 1)) == 1  # it runs: frames arrive in order
            await leave(one)
            await eventually(lambda: sum(call.done() for call in calls) == 2)
            assert not runs(first)
            assert runs(second)
            await eventually(lambda: it.capacity == 14)
            assert it._processes[1]._child._process.pid == second
            await leave(*(call for call in calls if not call.done()))


async def test_in_a_pool_they_go_where_there_is_room_and_the_rest_waits(tmp_path):
    go = tmp_path / "go"
    async with pool({"later_loads_wait_for": str(go)}, {"capacity": 2}, settings=CUTTING) as it:
        first, second = it._processes
        said = [[] for _ in range(5)]
        asked = [request("waits_the_first_time", str(tmp_path / f"n{n}")) for n in range(5)]
        calls = []
        for one, heard in zip(asked, said, strict=True):
            one.waits = heard.append
            calls.append(asyncio.create_task(it.generate(one)))
        await eventually(lambda: all((tmp_path / f"n{n}").exists() for n in range(5)))
        assert (first.held, second.held) == (5, 0)
        await leave(await begin(first, "goes_on"))
        assert await asyncio.gather(*calls[:2]) == [second._child._process.pid] * 2
        await eventually(lambda: first.held == 3)
        assert it.capacity == 3 + 2
        assert not any(call.done() for call in calls[2:])
        assert said == [[True, False]] * 2 + [[True, False, True]] * 3
        go.touch()
        assert await asyncio.gather(*calls[2:]) == [first._child._process.pid] * 3
        assert said[2:] == [[True, False, True, False]] * 3


async def test_a_pause_of_the_worker_is_not_held_against_a_request(monkeypatch):
    overdue, told = [], []
    calls = Calls(told.append, 5.0, lambda: overdue.append(1))
    loop = asyncio.get_running_loop()
    call = calls.enter(1, request("x"))
    calls.leave(1)
    assert told == [1]
    due, first = call.timer.when(), call.timer
    monkeypatch.setattr(loop, "time", lambda: due + 60)
    first._run()  # as the loop does when it goes on a minute later
    assert overdue == []
    assert call.timer.when() == due + 60 + 5
    monkeypatch.setattr(loop, "time", lambda: due + 60 + 5)
    call.timer._run()
    assert overdue == [1]
    calls.settle({"kind": "ended", "id": 1})
    assert call.timer.cancelled()
    assert list(calls) == []
