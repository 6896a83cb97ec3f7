"""What a request of a function that does nothing costs on each way to it, in microseconds by the clock."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.functions.noop import nothing
from rejoinder.adapters import Outgoing, Subscription, open_subscription, open_topic
from rejoinder.adapters.memory import fresh_url
from rejoinder.worker.engines.factory import create_engine
from rejoinder.worker.engines.protocol import Engine, EngineRequest
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings

NOOP = Path(__file__).with_name("noop.py")
BATCH = Settings.model_fields["max_batch_size"].default
WARM = 500
"""Requests before the clock runs: the first ones start threads and fill caches."""
LOOPS = 20
"""Of the calls themselves, which are too quick to be timed once."""
LIMIT = 300.0

Way = Callable[[int], Coroutine[Any, Any, "Cost"]]


class Cost(NamedTuple):
    """Seconds by the clock, and of the processor in this process and those that it started."""

    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Cost":
        """What it was so far."""
        own = psutil.Process()
        times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
        return cls(time.perf_counter(), sum(one.user + one.system for one in times))

    def each(self, count: int) -> "Cost":
        """What it has been since, for each of `count` requests."""
        now = Cost.now()
        return Cost((now.clock - self.clock) / count, (now.processor - self.processor) / count)


def app(path: Path, **settings: Any) -> Settings:
    """The settings of a worker with the functions of one file, on queues of its own."""
    return Settings(requests=fresh_url(), responses=fresh_url(), app=path.stem, app_dir=path.parent, **settings)


async def answer(engine: Engine, requests: Iterator[EngineRequest]) -> None:
    """Have all `requests` answered, as many at once as the engine has room for."""

    async def one_by_one() -> None:
        for request in requests:
            await engine.generate(request)

    async with asyncio.TaskGroup() as group:
        for _ in range(engine.capacity):
            group.create_task(one_by_one())


def requests(path: str, bodies: Iterator[Any]) -> Iterator[EngineRequest]:
    """A request of each body."""
    for number, body in enumerate(bodies):
        yield EngineRequest(path, body, f"r-{number}", 0)


def _bodies(count: int) -> Iterator[Any]:
    return ({"text": f"hello {number}"} for number in range(count))


async def called(count: int, size: int) -> Cost:
    """The function itself in a loop, on lists that are there already."""
    bodies = list(_bodies(count))
    batches = [bodies[at : at + size] for at in range(0, count, size)]
    began = Cost.now()
    for _ in range(LOOPS):
        for batch in batches:
            nothing(batch)
    return began.each(count * LOOPS)


async def through_engine(count: int, *, process: bool) -> Cost:
    """`FunctionsEngine` in this process, or in one of its own behind `EngineProcess`."""
    engine = create_engine(app(NOOP, engine_process=process))
    await engine.start()
    try:
        await answer(engine, requests("/nothing", _bodies(WARM)))
        began = Cost.now()
        await answer(engine, requests("/nothing", _bodies(count)))
        return began.each(count)
    finally:
        await engine.stop()


async def through_worker(count: int, settings: Settings) -> Cost:
    """A whole worker on queues in memory, with a backlog, once it has answered some."""
    signals = StopSignals()
    async with open_topic(settings.requests) as topic, open_subscription(settings.responses) as subscription:
        backlog = [{"metadata": {"id": n}, "body": body} for n, body in enumerate(_bodies(count + WARM))]
        for at in range(0, len(backlog), 1000):
            await topic.publish([Outgoing(json.dumps(body).encode()) for body in backlog[at : at + 1000]])
        worker = asyncio.create_task(serve(settings, signals))
        done = await _answered(subscription, WARM)
        began = Cost.now()
        cost = began.each(await _answered(subscription, len(backlog)) - done)
        signals.stop.set()
        await worker
    return cost


async def _answered(subscription: Subscription, count: int) -> int:
    """Wait until `count` responses are there; return how many there are."""
    async with asyncio.timeout(LIMIT):
        while True:
            backlog = await subscription.backlog()
            if (backlog.waiting or 0) >= count:
                return backlog.waiting or 0
            await asyncio.sleep(0.005)


def _echo() -> Settings:
    return Settings(requests=fresh_url(), responses=fresh_url(), engine="echo")


def _noop(*, process: bool) -> Settings:
    return app(NOOP, engine_process=process, default_path="/nothing")


WAYS: dict[str, Way] = {
    f"called in a loop, {BATCH} at a time": lambda count: called(count, BATCH),
    "called in a loop, one at a time": lambda count: called(count, 1),
    "the engine in this process": lambda count: through_engine(count, process=False),
    "the engine in a process of its own": lambda count: through_engine(count, process=True),
    "a worker with echo in its place": lambda count: through_worker(count, _echo()),
    "a worker with the engine in its process": lambda count: through_worker(count, _noop(process=False)),
    "a worker": lambda count: through_worker(count, _noop(process=True)),
}
