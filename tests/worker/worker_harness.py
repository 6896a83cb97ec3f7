"""A worker in this process, on the memory broker, with an engine that a test controls."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from rejoinder.adapters import (
    AdapterError,
    Backlog,
    Message,
    Outgoing,
    Subscription,
    Topic,
    open_subscription,
    open_topic,
)
from rejoinder.adapters.memory import fresh_url
from rejoinder.worker.engines.protocol import Engine, EngineRequest, EngineStats
from rejoinder.worker.service import StopSignals, serve
from rejoinder.worker.settings import Settings

LIMIT = 60.0


async def until(condition: Callable[[], Any], limit: float = LIMIT) -> None:
    """Wait for a condition; fail when it does not come true in `limit` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.005)


class GateEngine:
    """Runs each request when the test opens its gate; the body says what happens then."""

    def __init__(self, capacity: int = 4) -> None:
        self.paths = frozenset({"/run", "/v1/completions"})
        self.capacity = capacity
        self.progress = 0
        self.stats = EngineStats()
        self.running: dict[Any, asyncio.Event] = {}
        self.started: list[Any] = []
        self.cancelled: list[Any] = []
        self.errors: dict[Any, list[Exception]] = {}
        self.open = False
        self.gone = asyncio.Event()

    async def start(self) -> None:
        """Nothing to load."""

    async def generate(self, request: EngineRequest) -> Any:
        key = json.dumps(request.body)
        self.started.append(request.body)
        gate = self.running[key] = asyncio.Event()
        try:
            if not self.open:
                await gate.wait()
            errors = self.errors.get(request.body) if isinstance(request.body, str) else None
            if errors:
                raise errors.pop(0)
            self.progress += 1
            return {"ran": request.body}
        except asyncio.CancelledError:
            self.cancelled.append(request.body)
            raise
        finally:
            self.running.pop(key, None)

    def release(self, body: Any) -> None:
        self.running[json.dumps(body)].set()

    async def wait_gone(self) -> None:
        await self.gone.wait()

    async def stop(self) -> None:
        """Nothing to free."""


@dataclass
class Bench:
    """Both queues, the worker between them, and what came out."""

    requests: str
    responses: str
    engine: Any
    settings: Settings
    subscription: Subscription
    request_topic: Topic
    response_subscription: Subscription
    signals: StopSignals = field(default_factory=StopSignals)
    task: asyncio.Task[None] | None = None
    got: list[tuple[dict[str, Any], Message]] = field(default_factory=list)

    async def send(self, body: Any, metadata: Any = None, **fields: Any) -> str:
        envelope = {"path": "/run", "metadata": metadata or {"n": 1}, "body": body, **fields}
        return await self.send_raw(json.dumps(envelope).encode())

    async def send_raw(self, data: bytes) -> str:
        (outcome,) = await self.request_topic.publish([Outgoing(data)])
        assert isinstance(outcome, str), outcome
        return outcome

    def start(self) -> None:
        self.task = asyncio.create_task(serve(self.settings, self.signals, self.engine))

    async def responses_until(self, count: int, limit: float = LIMIT) -> list[dict[str, Any]]:
        deadline = time.monotonic() + limit
        while len(self.got) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(self.got)} of {count} responses came"
            if self.task is not None and self.task.done():
                self.task.result()
            messages = await self.response_subscription.receive(100, min(left, 0.5))
            await self.response_subscription.ack(messages)
            self.got += [(json.loads(message.body), message) for message in messages]
        return [response for response, _ in self.got]

    async def stop(self) -> None:
        """Stop the worker and let what it raised through."""
        self.signals.receive("SIGTERM")
        assert self.task is not None
        await asyncio.wait_for(self.task, LIMIT)


@contextlib.asynccontextmanager
async def bench(
    engine: Engine | None = None, *, request_options: str = "", start: bool = True, **settings: Any
) -> AsyncIterator[Bench]:
    requests, responses = fresh_url(), fresh_url()
    settings = {"retry_delay_seconds": 0.05, "grace_seconds": 10.0, **settings}
    async with (
        open_subscription(requests + request_options) as subscription,
        open_topic(requests) as request_topic,
        open_subscription(responses) as response_subscription,
    ):
        it = Bench(
            requests,
            responses,
            engine or GateEngine(),
            Settings(requests=requests + request_options, responses=responses, engine="echo", **settings),
            subscription,
            request_topic,
            response_subscription,
        )
        if start:
            it.start()
        try:
            yield it
        finally:
            it.signals.stop.set()
            it.signals.hurry.set()
            if it.task is not None:
                await asyncio.wait({it.task}, timeout=LIMIT)
                assert it.task.done()


async def until_backlog(it: Bench, condition: Callable[[Backlog], bool], limit: float = LIMIT) -> None:
    """Wait until the request queue's backlog is as wanted."""
    deadline = time.monotonic() + limit
    while not condition(backlog := await it.subscription.backlog()):
        assert time.monotonic() < deadline, backlog
        await asyncio.sleep(0.005)


async def until_empty(it: Bench) -> None:
    """Wait until every request is settled."""
    await until_backlog(it, lambda backlog: backlog.waiting + backlog.held == 0)


class Flaky:
    """A real memory topic or subscription whose calls fail, or never return, when the test says so."""

    inner: Any = None

    def __init__(self) -> None:
        self.fail: dict[str, list[AdapterError]] = {}
        self.hang: set[str] = set()
        self.calls: list[str] = []
        self.under_way = 0

    def __getattr__(self, name: str) -> Any:
        inner = getattr(self.inner, name)
        if not asyncio.iscoroutinefunction(inner):
            return inner

        async def call(*args: Any) -> Any:
            self.calls.append(name)
            if self.fail.get(name):
                raise self.fail[name].pop(0)
            self.under_way += 1
            try:
                while name in self.hang:
                    await asyncio.sleep(0.005)
                return await inner(*args)
            finally:
                self.under_way -= 1

        return call


@contextlib.asynccontextmanager
async def flaky(it: Bench, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Flaky, Flaky]]:
    """Put `Flaky` around what the worker of `it` opens: its subscription and its topic."""
    parts = Flaky(), Flaky()

    def opening(part: Flaky, real: Any) -> Any:
        @contextlib.asynccontextmanager
        async def opened(url: str) -> AsyncIterator[Any]:
            async with real(url) as inner:
                part.inner = inner
                yield part

        return opened

    monkeypatch.setattr("rejoinder.worker.service.open_subscription", opening(parts[0], open_subscription))
    monkeypatch.setattr("rejoinder.worker.service.open_topic", opening(parts[1], open_topic))
    yield parts
