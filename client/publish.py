"""Publish requests: checked, batched, several batches in flight, all of it bounded.

async with Publisher("sqlite:///work.db?queue=requests") as publisher:
    message_id = await publisher.publish({"metadata": {"doc": 17}, "body": {"prompt": "Once"}})

Leaving the context waits for what is in flight.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

from rejoinder.adapters import AdapterError, Outgoing, TooLarge, Topic, Transient, open_topic
from rejoinder.client.lines import Line
from rejoinder.client.patience import delays, patiently
from rejoinder.schemas.envelope import parse_request
from rejoinder.schemas.wire import WireError, write_json

BATCH_MESSAGES = 256
BATCH_BYTES = 1 << 20
"""A batch is closed at either: an adapter's round trip and its fsync are shared by this many messages."""
BATCHES_IN_FLIGHT = 4
WINDOW_MESSAGES = 2 * BATCH_MESSAGES * BATCHES_IN_FLIGHT
WINDOW_BYTES = 64 << 20
"""`publish_lines` holds at most this much whose outcome it does not know."""


class Outcome(NamedTuple):
    """What became of one line."""

    line: Line
    result: str | WireError | AdapterError
    """The broker's message id, or what went wrong."""


@dataclass(slots=True, eq=False)
class _Pending:
    outgoing: Outgoing
    future: "asyncio.Future[str]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def __post_init__(self) -> None:
        # An outcome that nobody asks for, since the publisher was interrupted, is no news.
        self.future.add_done_callback(lambda future: future.cancelled() or future.exception())

    def settle(self, outcome: str | Exception) -> None:
        if self.future.done():  # its publisher was cancelled
            return
        if isinstance(outcome, str):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)


class Publisher:
    """Publishes to one topic. An async context manager.

    `publish` may be called from many tasks at once. What is called while other batches are on their way shares the
    next one, so nothing waits for a timer and a busy publisher needs few round trips.

    A transient failure is tried again here, a few times, one message at a time: a batch that partly failed must not
    go out whole again, which is what a retry around the call would do. When a call breaks off, its messages may be
    there already and are sent again: a doubled request is answered twice, and `join` shows it; a lost one is lost.
    FIFO queues of SQS keep one of the two.
    """

    def __init__(self, url: str) -> None:
        """Name the topic.

        Args:
            url: As `rejoinder.adapters.open_topic` takes it.
        """
        self._url = url
        self._stack = AsyncExitStack()
        self._topic: Topic | None = None
        self._waiting: deque[_Pending] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._topic = await patiently(lambda: self._stack.enter_async_context(open_topic(self._url)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                for sender in self._senders:
                    sender.cancel()
            if self._senders:
                await asyncio.wait(self._senders)
        finally:
            while self._waiting:
                self._waiting.popleft().future.cancel()
            await self._stack.__aexit__(kind, exc, trace)

    async def publish(self, request: Mapping[str, Any] | bytes, *, check: bool = True) -> str:
        """Publish one request; return its message id when it is durable.

        Args:
            request: The request, or its JSON as UTF-8.
            check: Validate it first. Without, the bytes go out as they are.

        Raises:
            WireError: the request is not one (a `ValueError`); it was not published.
            ValueError, TypeError: the mapping cannot be written as JSON.
            TooLarge: larger than the broker carries.
            Transient: the broker did not take it in several tries.
            AdapterError: anything else that the broker said.
        """
        body = request if isinstance(request, bytes) else write_json(request).encode()
        if check:
            parse_request(body)
        return await self._start(body)

    async def publish_lines(
        self, lines: AsyncIterable[Sequence[Line]], *, check: bool = True
    ) -> AsyncGenerator[list[Outcome], None]:
        """Publish each line as one request; give the outcomes in order, as soon as those before them are known.

        Args:
            lines: Lists of lines, as `rejoinder.client.lines.stream_lines` gives them.
            check: Validate each first; a bad one is not published.
        """
        held: deque[_Held] = deque()
        size = 0
        source = aiter(lines)
        reading: asyncio.Future[Sequence[Line] | None] | None = asyncio.ensure_future(_next(source))
        try:
            while reading is not None or held:
                room = len(held) < WINDOW_MESSAGES and size < WINDOW_BYTES
                await _first_of(held, reading if room else None)
                if done := _known(held):
                    size -= sum(len(outcome.line.data) for outcome in done)
                    yield done
                if reading is not None and room and reading.done():
                    some = reading.result()
                    for line in some or ():
                        held.append((line, self._checked(line, check=check)))
                        size += len(line.data)
                    reading = None if some is None else asyncio.ensure_future(_next(source))
        finally:
            if reading is not None:
                reading.cancel()
                await asyncio.wait([reading])

    def _checked(self, line: Line, *, check: bool) -> "asyncio.Future[str] | WireError":
        if check:
            try:
                parse_request(line.data)
            except WireError as exc:
                return exc
        return self._start(line.data)

    def _start(self, body: bytes) -> "asyncio.Future[str]":
        if self._topic is None:
            raise RuntimeError("a Publisher is opened with `async with`")
        # The same at each try: a broker that knows it (a FIFO queue) takes what it has already for what it is.
        pending = _Pending(Outgoing(body, deduplication_id=uuid.uuid4().hex))
        if len(body) > self._topic.max_body:
            pending.settle(TooLarge(f"{len(body)} bytes; {self._topic.name} takes at most {self._topic.max_body}"))
            return pending.future
        self._waiting.append(pending)
        if len(self._senders) < BATCHES_IN_FLIGHT:
            sender = asyncio.create_task(self._send(self._topic))
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        return pending.future

    async def _send(self, topic: Topic) -> None:
        """Send batches until nothing waits. Runs a turn of the loop after it was started, so that a batch fills."""
        try:
            while batch := self._next_batch():
                await _send_with_retries(topic, batch)
        finally:
            # In the same step in which nothing was left: what is published next must start a sender of its own.
            self._senders.discard(asyncio.current_task())

    def _next_batch(self) -> list[_Pending]:
        batch: list[_Pending] = []
        size = 0
        while self._waiting and len(batch) < BATCH_MESSAGES:
            size += len(self._waiting[0].outgoing.body)
            if batch and size > BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch


async def _send_with_retries(topic: Topic, batch: list[_Pending]) -> None:
    try:
        for delay in delays():
            batch = await _send_once(topic, batch)
            if not batch:
                return
            await asyncio.sleep(delay)
        await _send_once(topic, batch, last=True)
    except asyncio.CancelledError:
        for pending in batch:
            pending.future.cancel()
        raise
    except Exception as exc:  # noqa: BLE001  # raised where each message is waited for
        for pending in batch:
            pending.settle(exc)


async def _send_once(topic: Topic, batch: list[_Pending], *, last: bool = False) -> list[_Pending]:
    """Publish `batch` and settle what is decided; return what is to be tried again."""
    outcomes: Iterable[str | AdapterError]
    try:
        outcomes = await topic.publish([pending.outgoing for pending in batch])
    except AdapterError as exc:
        outcomes = [exc] * len(batch)
    again: list[_Pending] = []
    for pending, outcome in zip(batch, outcomes, strict=True):
        if isinstance(outcome, Transient) and not last:
            again.append(pending)
        else:
            pending.settle(outcome)
    return again


_Held = tuple[Line, "asyncio.Future[str] | WireError"]


async def _next(source: AsyncIterator[Sequence[Line]]) -> Sequence[Line] | None:
    return await anext(source, None)


async def _first_of(held: deque[_Held], reading: "asyncio.Future[Sequence[Line] | None] | None") -> None:
    """Wait for the outcome of the front line or for more lines, whichever is first: neither holds up the other."""
    front = held[0][1] if held else None
    if not isinstance(front, WireError):
        await asyncio.wait([future for future in (front, reading) if future is not None], return_when="FIRST_COMPLETED")


def _known(held: deque[_Held]) -> list[Outcome]:
    """Take from the front what is decided already."""
    known: list[Outcome] = []
    while held:
        line, result = held[0]
        if isinstance(result, WireError):
            known.append(Outcome(line, result))
        elif result.done():
            error = result.exception()
            if error is not None and not isinstance(error, AdapterError):
                raise error
            known.append(Outcome(line, result.result() if error is None else error))
        else:
            break
        held.popleft()
    return known
