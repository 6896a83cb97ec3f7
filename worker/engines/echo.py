"""The echo engine: the request's body is the response's. For trials and for benchmarks of everything but a model."""

import asyncio
from typing import Any

from rejoinder.worker.engines.protocol import EngineRequest, EngineStats
from rejoinder.worker.errors import Missing, Unavailable

# Nothing runs, so this bounds only how many messages the worker holds at once: enough that broker round trips of some
# milliseconds overlap at thousands of messages per second, few enough that two workers share a short backlog.
CAPACITY = 512


class EchoEngine:
    """Answers `/echo` and the default path with the request's body."""

    def __init__(self, default_path: str, places: int = CAPACITY) -> None:
        self.paths = frozenset({"/echo", default_path})
        self._places = places
        self.capacity = 0
        self.progress = 0
        self.stats = EngineStats()

    async def start(self) -> None:
        """Nothing to load."""
        self.capacity = self._places

    async def generate(self, request: EngineRequest) -> Any:
        """Return the body; of a stream, emit its items, or itself where it is no list."""
        if request.path not in self.paths:
            raise Missing(f"{request.path} is not served; {' and '.join(sorted(self.paths))} are", param="path")
        if not self.capacity:
            raise Unavailable("the engine is not running")
        self.progress += 1
        if request.emit is None:
            return request.body
        for chunk in request.body if isinstance(request.body, list) else [request.body]:
            request.emit(chunk)
        return None

    async def wait_gone(self) -> None:
        """It cannot die."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Take no more."""
        self.capacity = 0
