"""An engine that says what the test lets it say, and what its streams look like on the response topic."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from worker_harness import Bench, GateEngine, until

from rejoinder.worker.engines.protocol import EngineRequest

STREAM = {"stream": True}


class Talker(GateEngine):
    """Says what the test lets it say, and ends when the test says so."""

    def __init__(self, capacity: int = 4) -> None:
        super().__init__(capacity)
        self.requests: dict[Any, EngineRequest] = {}
        self.ends: dict[Any, asyncio.Future[Any]] = {}

    async def generate(self, request: EngineRequest) -> Any:
        self.started.append(request.body)
        self.requests[request.body] = request
        self.ends[request.body] = asyncio.get_running_loop().create_future()
        try:
            return await self.ends[request.body]
        except asyncio.CancelledError:
            self.cancelled.append(request.body)
            raise

    def say(self, body: Any, *chunks: Any) -> None:
        emit = self.requests[body].emit
        assert emit is not None
        for chunk in chunks:
            emit(chunk)

    def end(self, body: Any, result: Any = None) -> None:
        if isinstance(result, Exception):
            self.ends[body].set_exception(result)
        else:
            self.ends[body].set_result(result)

    async def begun(self, *bodies: Any, times: int = 1) -> None:
        await until(lambda: all(self.started.count(body) >= times for body in bodies))


async def streaming_bench(it: Bench, *bodies: Any, **fields: Any) -> Talker:
    """Send requests for streams and wait until they run."""
    for body in bodies:
        await it.send(body, **{"options": STREAM, **fields})
    engine: Talker = it.engine
    await engine.begun(*bodies)
    return engine


def places(responses: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Of each: its body, and where it stands."""
    return [(one["body"], one["stream"]["index"], one["stream"]["done"]) for one in responses]


def flattened(responses: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """The chunks."""
    for one in responses:
        yield from one["body"] if one["stream"].get("chunks", 1) > 1 else [one["body"]]


def place(index: int, *, done: bool = False, **fields: int) -> dict[str, Any]:
    return {"index": index, "done": done, "attempt": 1, **fields}
