"""What a request of a function that does nothing costs on each way to it, in microseconds by the clock."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from benchmarks.echo import rate
from benchmarks.functions.noop import nothing
from rejoinder.adapters import Outgoing, open_topic
from rejoinder.adapters.memory import fresh_url
from rejoinder.worker.engines.factory import create_engine
from rejoinder.worker.engines.protocol import Engine, EngineRequest
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings

NOOP = Path(__file__).with_name("noop.py")
BATCH = Settings.model_fields["max_batch_size"].default
WARM = 500
"""Requests before the clock runs: the first ones start threads and fill caches."""

Way = Callable[[int], Coroutine[Any, Any, float]]


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


async def called(count: int, size: int) -> float:
    """The function itself in a loop, on lists that are there already."""
    bodies = list(_bodies(count))
    batches = [bodies[at : at + size] for at in range(0, count, size)]
    began = time.perf_counter()
    for batch in batches:
        nothing(batch)
    return time.perf_counter() - began


async def through_engine(count: int, *, process: bool) -> float:
    """`FunctionsEngine` in this process, or in one of its own behind `EngineProcess`."""
    engine = create_engine(app(NOOP, engine_process=process))
    await engine.start()
    try:
        await answer(engine, requests("/nothing", _bodies(WARM)))
        began = time.perf_counter()
        await answer(engine, requests("/nothing", _bodies(count)))
        return time.perf_counter() - began
    finally:
        await engine.stop()


async def through_worker(count: int, *, process: bool) -> float:
    """A whole worker on queues in memory, from the first response to the last."""
    settings, signals = app(NOOP, engine_process=process, log_level="warning"), StopSignals()
    backlog = [{"path": "/nothing", "metadata": {"id": n}, "body": body} for n, body in enumerate(_bodies(count))]
    async with open_topic(settings.requests) as topic:
        for at in range(0, count, 1000):
            await topic.publish([Outgoing(json.dumps(body).encode()) for body in backlog[at : at + 1000]])
    worker = asyncio.create_task(serve(settings, signals))
    seconds = count / await rate(settings.responses, count)
    signals.stop.set()
    await worker
    return seconds


WAYS: dict[str, Way] = {
    f"called in a loop, {BATCH} at a time": lambda count: called(count, BATCH),
    "called in a loop, one at a time": lambda count: called(count, 1),
    "the engine in this process": lambda count: through_engine(count, process=False),
    "the engine in a process of its own": lambda count: through_engine(count, process=True),
    "a worker with the engine in its process": lambda count: through_worker(count, process=False),
    "a worker": lambda count: through_worker(count, process=True),
}
