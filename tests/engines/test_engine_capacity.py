"""What a worker pulls follows the cache; how full the steps are and how long there was none; shared prefixes."""

import asyncio
import contextlib
import json
import os
import signal
import threading
import time

import pytest
from engine_harness import GREEDY, KINDS, SMALL, completion, eventually, started
from host_harness import engine_process, request
from structlog.testing import capture_logs

from rejoinder.adapters import Outgoing, open_subscription, open_topic
from rejoinder.worker import service
from rejoinder.worker.engines.host import EngineProcess, HostSettings
from rejoinder.worker.engines.transformers.engine import create
from rejoinder.worker.settings import Settings

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = 2 * 2 * 2 * 8 * 4 * 16  # both of K and V, layers, heads, size, bytes, tokens
LONG = {"prompt": [5] * 40, "max_tokens": 100, "temperature": 0}


def queues(folder):
    base = f"sqlite:///{folder / 'queues.db'}"
    return f"{base}?queue=requests", f"{base}?queue=responses"


async def send(requests, bodies):
    async with open_topic(requests) as topic:
        await topic.publish([Outgoing(json.dumps({"metadata": {}, "body": body}).encode()) for body in bodies])


async def answered(responses, count):
    async with open_subscription(responses) as subscription, asyncio.timeout(120):
        got = []
        while len(got) < count:
            messages = await subscription.receive(100, 1)
            await subscription.ack(messages)
            got += messages
    assert all(json.loads(message.body)["status_code"] == 200 for message in got)
    assert len(got) == count


@contextlib.asynccontextmanager
async def worker(queues, engine, **settings):
    requests, responses = queues
    signals = service.StopSignals()
    settings = Settings(requests=requests, responses=responses, engine="echo", grace_seconds=0, **settings)
    task = asyncio.create_task(service.serve(settings, signals, engine))
    try:
        yield task
    finally:
        signals.receive("SIGTERM")
        await asyncio.wait_for(task, 60)


class Steps:
    """Holds an engine's steps back, as a large model does."""

    def __init__(self, engine):
        self.go = threading.Event()
        self.go.set()
        scheduler = engine._batch._scheduler
        original = scheduler.schedule_batch

        def schedule(*arguments):
            self.go.wait()
            return original(*arguments)

        scheduler.schedule_batch = schedule


class Feeding:
    """Lets an engine make a step when its batch is full or the last sequence has come, as if steps were long.

    Where it is not full for seconds it waits no more: then it is not the machine that is slow.
    """

    def __init__(self, engine, total):
        self.came, self.total, self.patience = 0, total, 60.0
        manager, run = engine._batch._manager, engine._batch.run
        processor, original = manager.batch_processor, manager.batch_processor.prepare_next_batch

        def there():
            waiting = manager.input_queue.qsize() + len(processor.scheduler.waiting_requests)
            return waiting + len(processor.scheduler.active_requests)

        def prepare(*arguments):
            end = time.monotonic() + self.patience
            while self.came < self.total and there() < engine._batch.running:
                if time.monotonic() > end:
                    self.patience = 0.0
                    break
                time.sleep(0.001)
            return original(*arguments)

        def counted(*arguments):
            self.came += 1
            return run(*arguments)

        processor.prepare_next_batch, engine._batch.run = prepare, counted


async def test_a_worker_holds_what_fits_in_its_cache_and_another_gets_the_rest(tiny, tmp_path):
    both = queues(tmp_path)
    small = create({"model": str(tiny), **SMALL, "cache_bytes": 24 * PAGE})
    large = create({"model": str(tiny), **SMALL})
    async with worker(both, small, prefetch=2), open_subscription(both[0]) as requests:
        await eventually(lambda: small.capacity)
        await send(both[0], [LONG] * 20)
        await answered(both[1], 20)
        # 24 pages hold 4 sequences that take 3 to 9 of them. Places there are for 8, and for 2 at the door.
        await eventually(lambda: 3 <= small.capacity <= 5)
        steps = Steps(small)
        steps.go.clear()
        await send(both[0], [LONG] * 40)
        async with asyncio.timeout(60):
            while (await requests.backlog()).held < small.capacity + 2:
                await asyncio.sleep(0.01)
        async with worker(both, large, prefetch=2):
            await answered(both[1], 40 - small.capacity - 2)
            # What the other has answered it acks a moment later.
            async with asyncio.timeout(60):
                while (await requests.backlog()).held != small.capacity + 2:
                    await asyncio.sleep(0.01)
        steps.go.set()
        await answered(both[1], small.capacity + 2)


async def test_with_short_sequences_the_batch_is_full(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "REPORT_SECONDS", 0.05)
    both = queues(tmp_path)
    engine = create({"model": str(tiny), **SMALL})
    await send(both[0], [{"prompt": [5] * (4 + n % 7), "max_tokens": 8 + n % 17, "temperature": 0} for n in range(100)])
    await engine.start()
    Feeding(engine, 100)
    with capture_logs() as logs:
        engine.start = lambda: asyncio.sleep(0)  # it is started already
        async with worker(both, engine):
            await answered(both[1], 100)
            stats = engine.stats
    assert stats.sequences == sum(8 + n % 17 for n in range(100))
    assert stats.places == 8 * stats.steps
    assert stats.occupancy >= 0.9
    (last,) = [entry for entry in logs if entry["event"] == "worker_stopped"]
    assert last["occupancy"] == round(stats.occupancy, 3)
    progress = [entry["occupancy"] for entry in logs if entry["event"] == "progress" and "occupancy" in entry]
    assert max(progress) >= stats.occupancy


async def test_requests_of_several_sequences_count_as_many(tiny):
    engine = await started(tiny, max_running=16)
    try:
        assert engine.capacity == 20
        for n in range(60):
            await engine.generate(completion({**GREEDY, "max_tokens": 1, "n": 4}, str(n)))
        assert 5 <= engine.capacity <= 6
        many = [engine.generate(completion({**GREEDY, "max_tokens": 1, "n": 128}, str(n))) for n in range(3)]
        await asyncio.gather(*many)
        assert engine.capacity >= 4, "no more than a quarter of the places run of one request at once"
    finally:
        await engine.stop()


async def test_the_figures_cross_the_process(tiny):
    config = {"model": str(tiny), **SMALL}
    patient = HostSettings(stop_seconds=60)
    engine = EngineProcess("rejoinder.worker.engines.transformers.engine:create", config, patient)
    await engine.start()
    try:
        body = {"prompt": [5] * 10, "max_tokens": 24, "temperature": 0}
        usage = (await engine.generate(completion(body)))["usage"]
        assert usage["completion_tokens"] == 24
        await eventually(lambda: engine.stats.steps == 24)
        stats = engine.stats
        assert (stats.sequences, stats.places, stats.tokens) == (24, 24 * 8, 10 + 23)
        assert stats.occupancy == 1 / 8
        await eventually(lambda: engine.stats.idle_seconds > stats.idle_seconds)
        await engine.generate(completion(body))
    finally:
        await engine.stop()
    assert engine.stats.steps == 48, "the last word, said after the last heartbeat"


async def test_the_figures_outlive_the_process():
    async with engine_process() as engine:
        for n in range(3):
            await engine.generate(request("echo", n))
        await eventually(lambda: engine.stats.steps == 3)
        os.kill(engine._child._process.pid, signal.SIGKILL)
        await eventually(lambda: engine.capacity == 0)
        assert engine.stats.steps == 3
        await eventually(lambda: engine.capacity == 7)
        await engine.generate(request("echo", 4))
        await eventually(lambda: engine.stats.steps == 4)


async def test_a_shared_prefix_is_computed_once_and_changes_nothing(tiny):
    prefix = [3 + n % 200 for n in range(100)]
    requests = [completion({"prompt": [*prefix, 7 + n], "max_tokens": 8, **KINDS[n % 5]}, f"s{n}") for n in range(32)]
    texts, tokens = {}, {}
    for sharing in (True, False):
        engine = await started(tiny, prefix_sharing=sharing)
        try:
            texts[sharing] = await asyncio.gather(*map(engine.generate, requests))
            tokens[sharing] = engine.stats.tokens
        finally:
            await engine.stop()
    assert texts[True] == texts[False]
    assert tokens[False] == 32 * (101 + 7)
    assert tokens[True] <= tokens[False] - 31 * 96 + 64, "96 tokens are whole pages; a step of 64 may begin two at once"
