"""Time limits in real workers: what waits in the engine, what hangs there, and what ran beside it."""

import asyncio
import json
from pathlib import Path

import pytest
from engine_harness import eventually
from test_functions_worker import answers, envelopes, message, working

from rejoinder.adapters import open_subscription


async def test_a_request_that_waits_for_its_function_does_not_use_up_its_time(tmp_path):
    # The capacity is that of all functions: requests of one of them come in and wait for their turn.
    source = """
        import time
        @generate("/lane", concurrency=1)
        def one(body):
            time.sleep(1.2)
            return body
        @generate_batch("/batch", max_batch_size=1)
        def many(bodies):
            time.sleep(1.2)
            return bodies
        @generate("/wide", concurrency=20)
        def wide(body): return body
    """
    with working(tmp_path, source, "--invocation-timeout-seconds", "4") as (worker, queues):
        for path in ("/lane", "/batch"):
            await queues.send(*envelopes(range(5), path=path))
            assert await answers(queues, 5) == [(200, n) for n in range(5)]
        assert worker.stop() == 0


async def test_what_waits_for_its_function_goes_back_at_once_when_the_worker_stops(tmp_path):
    source = f"""
        import pathlib, time
        @generate("/lane", concurrency=1)
        def one(body):
            pathlib.Path({str(tmp_path)!r}, "running").touch()
            while not pathlib.Path({str(tmp_path)!r}, "go").exists(): time.sleep(0.01)
            return body
        @generate("/wide", concurrency=20)
        def wide(body): return body
    """
    with working(tmp_path, source, "--grace-seconds", "60") as (worker, queues):
        await queues.send(*envelopes(range(4), path="/lane"))
        worker.until_event("engine_ready")
        await eventually(Path(tmp_path, "running").exists)
        worker.process.terminate()
        async with open_subscription(queues.requests) as subscription, asyncio.timeout(30):
            while (await subscription.backlog()).waiting != 3:
                await asyncio.sleep(0.02)
        Path(tmp_path, "go").touch()
        assert await asyncio.to_thread(worker.process.wait, 120) == 0
        [drained] = worker.events("drained")
        assert (drained["answered"], drained["handed_back"]) == (1, 3)


HANGING = """
    import pathlib, time
    folder = pathlib.Path({folder!r})
    def work(body):
        if body == "hang": time.sleep(3600)
        while not (folder / "replaced").exists(): time.sleep(0.01)
        return body
    @generate
    def one(body): return work(body)
    @generate_batch("/batch", max_batch_size=2, concurrency=3, key=str, max_wait_ms=100)
    def many(bodies): return [work(body) for body in bodies]
"""


@pytest.mark.parametrize("path", ["/v1/completions", "/batch"])
async def test_one_that_hangs_is_answered_in_time_and_its_neighbours_at_their_first_attempt(tmp_path, path):
    more = ("--app-cancel-seconds", "0.5")
    with working(tmp_path, HANGING.format(folder=str(tmp_path)), *more) as (worker, queues):
        hang = json.dumps(
            {"metadata": {"n": 0}, "body": "hang", "path": path, "options": {"invocation_timeout_seconds": 3}}
        )
        neighbours = envelopes(["a", "b"], path=path)
        await queues.send(hang.encode(), *neighbours)
        [first] = await queues.receive(1)
        assert json.loads(first.body)["status_code"] == 504
        worker.until_event("engine_process_replaced")
        (tmp_path / "replaced").touch()
        got = await queues.receive(2)
        assert sorted((json.loads(one.body)["status_code"], json.loads(one.body)["body"]) for one in got) == [
            (200, "a"),
            (200, "b"),
        ]
        assert [one.attributes["attempt"] for one in got] == ["1", "1"]
        assert not worker.events("engine_process_died")
        assert worker.stop() == 0


async def test_a_worker_says_which_app_it_starts_and_shows_what_it_prints(tmp_path):
    source = """
        import os
        print("at import")
        @generate
        def one(body):
            print("in a call")
            if body: os._exit(1)
    """
    # As anywhere but where somebody has set it: a process that writes to no terminal gathers what it prints.
    more = ("--max-attempts", "1")
    with working(tmp_path, source, *more, env={"PYTHONUNBUFFERED": ""}) as (worker, queues):
        await queues.send(*envelopes([1]))
        assert message((await answers(queues, 1))[0])[0] == 503
        [starting] = worker.events("worker_starting")
        assert starting["app"].startswith("app_")
        assert "model" not in starting
    log = (tmp_path / "log").read_text()
    assert "at import\n" in log
    assert "in a call\n" in log
