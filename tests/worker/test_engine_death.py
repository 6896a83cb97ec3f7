"""A worker whose engine holds its GIL, dies or hangs: leases go on, messages come back, and it ends when it must."""

import asyncio
import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from worker_harness import bench, until, until_backlog, until_empty

from rejoinder.adapters import open_subscription
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.errors import EngineGone

QUICK = {"start_seconds": 120.0, "restart_backoff": 0.05, "restart_backoff_limit": 0.2}


def engine(**settings: float) -> EngineProcess:
    return EngineProcess("misbehaving:create", {}, HostSettings(**{**QUICK, **settings}))


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


async def test_an_engine_that_holds_its_gil_for_15_s_loses_no_6_s_lease() -> None:
    async with bench(engine(), request_options="?lease=6", prefetch=2) as it:
        await it.send_raw(b'{"path":"/do","metadata":{"n":1},"body":{"holds_gil":15}}')
        await it.send_raw(b'{"path":"/do","metadata":{"n":2},"body":{"echo":2}}')
        await until_backlog(it, lambda backlog: backlog.held == 2, limit=30)
        async with open_subscription(it.requests) as other_worker:
            watching = asyncio.create_task(other_worker.receive(10, 60))
            await it.responses_until(2, limit=60)
            assert not watching.done(), "a lease ran out while the engine held its GIL"
            watching.cancel()
        assert all(message.attributes["attempt"] == "1" for _, message in it.got)
        await until_empty(it)


async def test_a_killed_engine_s_messages_are_handed_back_and_answered_by_the_next(tmp_path: Path) -> None:
    async with bench(engine(), retry_delay_seconds=0.1) as it:
        await it.send_raw(b'{"path":"/do","metadata":{"n":0},"body":{"echo":0}}')
        await it.responses_until(1, limit=60)
        marks = [tmp_path / name for name in "ab"]
        for number, mark in enumerate(marks, 1):
            body = {"waits_the_first_time": str(mark)}
            await it.send_raw(json.dumps({"path": "/do", "metadata": {"n": number}, "body": body}).encode())
        await until(lambda: all(mark.exists() for mark in marks))
        os.kill(it.engine._child._process.pid, signal.SIGKILL)
        responses = await it.responses_until(3, limit=60)
        assert [response["status_code"] for response in responses] == [200, 200, 200]
        assert {message.attributes["attempt"] for _, message in it.got[1:]} == {"2"}
        await until_empty(it)


async def test_a_hung_engine_is_killed_and_its_messages_come_back() -> None:
    async with bench(engine(hang_seconds=1.0), max_attempts=2, retry_delay_seconds=0.1) as it:
        await it.send_raw(b'{"path":"/do","metadata":{"n":1},"body":{"stops_itself":0}}')
        (response,) = await it.responses_until(1, limit=60)
        assert response["status_code"] == 503
        assert it.got[0][1].attributes["attempt"] == "2"


async def test_repeated_deaths_end_the_worker_with_everything_handed_back() -> None:
    others = children()
    async with bench(engine(max_deaths=3), max_attempts=100, retry_delay_seconds=0.01, grace_seconds=5) as it:
        for _ in range(4):  # one alone would be to blame itself
            await it.send_raw(b'{"path":"/do","metadata":{"n":1},"body":{"exits":3}}')
        with pytest.raises(EngineGone):
            await asyncio.wait_for(it.task, 60)
        await until(lambda: children() <= others)
        backlog = await it.subscription.backlog()
        assert backlog.waiting + backlog.held == 4
